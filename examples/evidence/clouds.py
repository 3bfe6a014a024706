"""t-SNE of the features of several encoders, of images as they are and blurred: Figs. 4 and 5 of the SER paper."""

from pathlib import Path

import torch
from evidence import pretraining
from evidence.corruptions import corrupted
from evidence.datasets import folders
from evidence.experiments import PLAN
from evidence.measures import features_of
from evidence.networks import encode
from evidence.runs import Job, Place, final
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from equireg import within_class_variance


def draw_clouds_of(place: Place, group: str, folder: Path) -> None:
    """Of a finished group that the plan wants drawn, by the networks of its first seed."""
    if arms := PLAN["clouds"].get(group):
        jobs = {arms[job.arm]: job for job in final(place, group) if job.seed == 0 and job.arm in arms}
        draw_clouds(jobs, folder / f"results-{group}-tsne.png")


def draw_clouds(jobs: dict[str, Job], path: Path, images: int = 1000) -> None:
    """A row for each finished run, by its name: test images as they are, and under ImageNet-C's defocus blur.

    Below a cloud stands the share of the variance that is within classes, of the features themselves.
    """
    figure = Figure((10, 4.5 * len(jobs)), layout="constrained")
    for row, (name, job) in zip(figure.subplots(len(jobs), 2, squeeze=False), jobs.items()):
        s = job.settings()
        objective, _ = pretraining.prepare(s, job.place.data, job.place.runs, job.folder, job.seed)
        objective.eval().network.load_state_dict(torch.load(job.folder / "encoder.pt", weights_only=True))
        test = folders(job.place.data / s["data"]["folder"], "test", s["image_size"]).evenly(images)
        blurred, width = corrupted(test.pixels, "defocus_blur", 3, seed=0), objective.network.num_features
        for axes, (pixels, word) in zip(row, ((test.pixels, "as they are"), (blurred, "blurred"))):
            features = encode(features_of(objective), pixels)[:, -width:]  # of class tokens the last one
            share = within_class_variance(features, test.labels, relative=True)
            points = TSNE(perplexity=min(30, len(features) / 4), random_state=0).fit_transform(features.numpy())
            axes.scatter(*points.T, s=8, c=test.labels.numpy(), cmap="tab10")
            axes.set(xlabel=f"within classes: {100 * share:.1f}% of the variance", xticks=[], yticks=[])
            axes.set_title(f"{name}: images {word}", fontsize=11)
    figure.savefig(path, dpi=100)
