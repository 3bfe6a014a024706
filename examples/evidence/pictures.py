"""Pictures of what saved networks see: SER's Figs. 4 and 5, and Fig. 2 (a) of IP-IRM's report."""

from pathlib import Path

import torch
from evidence.corruptions import corrupted
from evidence.datasets import Images, folders
from evidence.experiments import PLAN
from evidence.measures import KINDS_OF_PAIRS, data_set_of, features_of
from evidence.networks import encode
from evidence.runs import Job, Place, final, trained
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor, nn

from equireg import IntermediateViews, linear_probe, within_class_variance


def draw_pictures(place: Place, group: str, folder: Path) -> None:
    """``results-<group>-<name>.png``, as the plan wants them of a finished group, of the networks of its first seed."""
    for name, groups in PLAN["pictures"].items():
        arms = groups.get(group, {})
        if jobs := {arms[job.arm]: job for job in final(place, group) if job.arm in arms and job.seed == 0}:
            {"tsne": draw_clouds, "augmented": draw_shares}[name](jobs, folder / f"results-{group}-{name}.png")


def draw_clouds(jobs: dict[str, Job], path: Path) -> None:
    """t-SNE of the features of test images as they are, and under ImageNet-C's defocus blur, in the colours of classes.

    Below a cloud stands the share of the variance that is within classes, of the features themselves.
    """
    figure = Figure((10, 4.5 * len(jobs)), layout="constrained")
    figure.suptitle("Test images; a colour is a class", fontsize=11)
    for row, (name, job) in zip(figure.subplots(len(jobs), 2, squeeze=False), jobs.items()):
        s, objective = job.settings(), trained(job)
        test = folders(job.place.data / s["data"]["folder"], "test", s["image_size"]).evenly(1000)
        blurred, width = corrupted(test.pixels, "defocus_blur", 3, seed=0), objective.network.num_features
        for axes, (pixels, word) in zip(row, ((test.pixels, "as they are"), (blurred, "blurred"))):
            features = encode(features_of(objective), pixels)[:, -width:]  # of class tokens the last one
            share = within_class_variance(features, test.labels, relative=True)
            points = TSNE(perplexity=min(30, len(features) / 4), random_state=0).fit_transform(features.numpy())
            axes.scatter(*points.T, s=8, c=test.labels.numpy(), cmap="tab10")
            axes.set(xlabel=f"within classes: {100 * share:.1f}% of the features' variance", xticks=[], yticks=[])
            axes.set_title(f"{name}: images {word}", fontsize=11)
    figure.savefig(path, dpi=100)


def draw_shares(jobs: dict[str, Job], path: Path) -> None:
    """Which dimensions of the features follow the augmentations, and what either half of them is worth.

    The dimensions are sorted by the mean of their shares, and halved: the later half follows. Linear probes read
    either half and all, of the data set that the encoder learnt from.
    """
    figure = Figure((10, 3 * len(jobs)), layout="constrained")
    for row, (name, job) in zip(figure.subplots(len(jobs), 2, squeeze=False, width_ratios=[3, 1]), jobs.items()):
        s, objective = job.settings(), trained(job)
        folder, size, shots = job.place.data / s["data"]["folder"], s["image_size"], s["shots"][data_set_of(s)][-1]
        few, test = folders(folder, "train", size, draw=job.seed, shots=shots), folders(folder, "test", size)
        shares = augmented_shares(objective, test.evenly(s["probe_images"]).pixels)
        order = shares.mean(0).argsort()
        picture = row[0].imshow(shares[:, order].numpy(), aspect="auto", vmin=0, vmax=1, cmap="inferno")
        figure.colorbar(picture, ax=row[0])
        row[0].set_yticks(range(len(KINDS_OF_PAIRS)), [kind.replace("color", "colour") for kind in KINDS_OF_PAIRS])
        row[0].set(title=f"{name}: share of the variance", xlabel="dimension")
        still, following = order.tensor_split(2)
        columns = {"still": still, "following": following, "all": order}
        found = [accuracy(objective, few, test, part) for part in columns.values()]
        row[1].bar_label(row[1].bar(list(columns), found), fmt="%.1f")
        row[1].set(title="linear accuracy, %")
        row[1].margins(y=0.12)
    figure.savefig(path, dpi=100)


def augmented_shares(objective: nn.Module, pixels: Tensor) -> Tensor:
    """[4, D], by augmentation: the variance between four views of an image over that of all views of all images."""
    generator, found = torch.Generator().manual_seed(0), []
    for kind in KINDS_OF_PAIRS:
        views = IntermediateViews(kind, num_intermediate=1, sigma=(0.1, pixels.shape[-1] / 32))
        parts = [views(pixels / 255, generator)[0] for _ in range(4)]
        features = torch.stack([encode(features_of(objective), part) for part in parts])  # [4, images, D]
        found.append(features.var(0).mean(0) / features.flatten(0, 1).var(0).clamp(min=1e-12))
    return torch.stack(found)


def accuracy(objective: nn.Module, few: Images, test: Images, columns: Tensor) -> float:
    """Of a linear probe on some dimensions, in percent."""
    x, held_out = (encode(features_of(objective), part.pixels)[:, columns] for part in (few, test))
    return 100 * linear_probe(x, few.labels, held_out, test.labels, progress=False)
