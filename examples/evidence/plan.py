"""What is trained for the report: groups of arms that differ in one thing, and the settings that are tried."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from evidence.trainings import Probes, fine_tune, pretrain, train_digits

TUNING_SEED = 100  # of no seed that is reported


class Scale(NamedTuple):
    """How large everything is."""

    seeds: int
    ser: dict[str, Any]
    reconstruction: dict[str, Any]
    ipirm: dict[str, Any]
    finetuning: dict[str, Any]
    epochs: dict[str, int]  # of fine-tuning, for each group
    digits_epochs: int
    probe_images: int  # of each corruption
    r2_epochs: int
    shots: dict[str, tuple[int, ...]]  # labels of each class that probes get


SHOTS = {"CIFAR-10": (10, 50), "VIPriors": (10, 20, 50)}
SCALES = {
    # Two and a half hours on two CPU cores: small networks on images of 32 pixels.
    "cpu": Scale(
        seeds=5,
        ser={"model": "test_vit", "depth": 6, "patch-size": 8, "images": 2000, "epochs": 16, "lr": 1e-3, "layer": 2},
        reconstruction={"depth": 4, "images": 2000, "epochs": 8},
        ipirm={"model": "resnet10t", "images": 2500, "epochs": 10, "update-every": 3, "batch-size": 125},
        finetuning={"model": "resnet10t", "image-size": 32, "batch-size": 100},
        epochs={"vipriors-10": 40, "vipriors-20": 24, "vipriors-50": 12, "cifar10-20": 60, "pacs": 30},
        digits_epochs=40,
        probe_images=300,
        r2_epochs=30,
        shots=SHOTS,
    ),
    # Ten to twenty hours on one large GPU: ViT-Tiny and ResNet-18 on images of 64 pixels, trained ten times as long.
    "gpu": Scale(
        seeds=5,
        ser={"depth": 12, "image-size": 64, "patch-size": 8, "images": 8000, "epochs": 100, "batch-size": 512},
        reconstruction={"depth": 12, "image-size": 64, "patch-size": 8, "sigma": 2.0, "images": 8000, "epochs": 100},
        ipirm={"image-size": 64, "images": 2500, "epochs": 400, "update-every": 50, "batch-size": 250},
        finetuning={"model": "resnet18", "image-size": 64, "batch-size": 128},
        epochs={"vipriors-10": 50, "vipriors-20": 50, "vipriors-50": 50, "cifar10-20": 100, "pacs": 50},
        digits_epochs=40,
        probe_images=1000,
        r2_epochs=100,
        shots=SHOTS,
    ),
    # Seconds: whether it runs.
    "test": Scale(
        seeds=2,
        ser={"model": "test_vit", "depth": 2, "images": 40, "epochs": 1, "batch-size": 20, "layer": 1},
        reconstruction={"model": "test_vit", "depth": 2, "images": 40, "epochs": 1, "batch-size": 20},
        ipirm={"model": "test_resnet", "images": 40, "epochs": 2, "update-every": 1, "batch-size": 20},
        finetuning={"model": "test_resnet", "image-size": 32, "batch-size": 16},
        epochs=dict.fromkeys(("vipriors-10", "vipriors-20", "vipriors-50", "cifar10-20", "pacs"), 1),
        digits_epochs=2,
        probe_images=20,
        r2_epochs=1,
        shots={"CIFAR-10": (2, 6), "VIPriors": (2, 6)},
    ),
}


def settings_of(scale: Scale, group: str) -> dict[str, Any]:
    """What decides the runs of a group, to tell runs of another plan from these."""
    if group == "digits":
        return {"epochs": scale.digits_epochs}
    if group in scale.epochs:
        return {**scale.finetuning, "epochs": scale.epochs[group], "encoder": scale.ipirm}
    return {"ipirm": scale.ipirm, "ser": scale.ser, "reconstruction": scale.reconstruction}[group]


class Arm(NamedTuple):
    """One way to train; ``choices`` are values of a flag, of which the best on validation images is taken.

    An ablation takes what was chosen for the arm that it is ``like``.
    """

    train: Callable[..., dict[str, Any]]  # (seed, folder, probes, **chosen)
    flag: str = ""
    choices: tuple[Any, ...] = ()
    like: str = ""


class Group(NamedTuple):
    """Arms that share everything but what their names say; the first one is the base."""

    arms: dict[str, Arm]
    needs: tuple[str, ...] = ()  # groups that are trained before


def plan(scale: Scale, data: Path, runs: Path) -> dict[str, Group]:
    """Every group, by name."""
    folders = {"CIFAR-10": data / "cifar10", "VIPriors": data / "tiny-vipriors64"}

    def probes(robust: str, split: str) -> Probes:
        sets = {name: (folder, scale.shots[name]) for name, folder in folders.items()}
        return Probes(sets, robust, split, scale.probe_images, scale.r2_epochs)

    def pretraining(trainer: str, own: dict[str, Any], robust: str, variant: Any, **more: Any) -> Callable[..., Any]:
        def train(seed: int, folder: Path, split: str = "test", **chosen: Any) -> dict[str, Any]:
            flags = {"data": folders[robust], "amp": "none", **own, **more, **chosen}
            return pretrain(trainer, flags, variant, seed, folder, probes(robust, split))

        return train

    def finetuning(group: str, where: dict[str, Any], similarity: str | None, **more: Any) -> Callable[..., Any]:
        def train(seed: int, folder: Path, split: str = "test", **chosen: Any) -> dict[str, Any]:
            encoder = runs / "ipirm" / "off" / str(seed) / "encoder.pt"
            own = {**scale.finetuning, **where, "epochs": scale.epochs[group], "encoder": encoder, "amp": "none"}
            if group == "cifar10-20":
                own["draw"] = seed
            measured = probes("VIPriors", split) if group == "vipriors-20" and split == "test" else None
            return fine_tune({**own, **more, **chosen}, similarity, seed, folder, measured)

        return train

    def digits(control: str | None) -> Callable[..., Any]:
        return lambda seed, folder, split="test": train_digits(control, seed, scale.digits_epochs)

    ser, rebuild, ipirm = scale.ser, scale.reconstruction, scale.ipirm
    groups = {
        "ipirm": Group(
            {
                "off": Arm(pretraining("ipirm", ipirm, "VIPriors", False)),
                "on": Arm(pretraining("ipirm", ipirm, "VIPriors", True), "weight", (0.2, 1.0)),
            }
        ),
        "ser": Group(
            {
                "off": Arm(pretraining("ser", ser, "CIFAR-10", False)),
                "views": Arm(pretraining("ser", ser, "CIFAR-10", True, weight=0.0)),
                "on": Arm(pretraining("ser", ser, "CIFAR-10", True), "weight", (0.5, 2.0)),
            }
        ),
        "reconstruction": Group(
            {
                "off": Arm(pretraining("reconstruction", rebuild, "CIFAR-10", 0)),
                "one": Arm(pretraining("reconstruction", rebuild, "CIFAR-10", 1), like="two"),
                "two": Arm(pretraining("reconstruction", rebuild, "CIFAR-10", 2), "weight", (1.0, 5.0)),
            }
        ),
    }
    places = {
        **{f"vipriors-{shots}": {"data": data / "tiny-vipriors64", "shots": shots} for shots in (10, 20, 50)},
        "cifar10-20": {"data": data / "cifar10", "shots": 20},
        "pacs": {"data": data / "pacs64", "layout": "domains", "shots": 100},
    }
    weights = ("weight", (2.0, 10.0, 100.0))
    for name, where in places.items():
        arms = {
            "off": Arm(finetuning(name, where, None, penalty="off")),
            "on": Arm(finetuning(name, where, "adjusted"), *weights),
        }
        if name in ("vipriors-20", "pacs"):
            arms["plain"] = Arm(finetuning(name, where, "plain"), like="on")
            arms["random"] = Arm(finetuning(name, where, "random"), like="on")
            arms["open"] = Arm(finetuning(name, where, "adjusted", open=True), "weight", (0.1, 1.0, 10.0))
        groups[name] = Group(arms, needs=("ipirm",))
    groups["digits"] = Group(
        {
            "off": Arm(digits("base")),
            "on": Arm(digits(None)),
            "weight 0": Arm(digits("without the penalty (weight 0)")),
            "random": Arm(digits("random environments")),
        }
    )
    return groups
