"""The pictures of the EqInv paper, of digits that mostly lie on the colour of their class.

    python examples/eqinv_pictures.py

A digit lies anywhere on an image of one colour: in training that of its class in 90% of the cases, in the test set any.
A small CNN is trained three times, as in the paper: from scratch, from SimCLR, and from that by ``ClassWiseIRM``; its
features are looked at before and after the mask. In runs/eqinv_pictures are class activation maps (Figs. 9, 10), test
features by t-SNE in the colours of classes and of contexts (Fig. 3), and V, the variance within classes (Fig. 6b). The
table has V as a share of the total, the same within contexts, and the share of the maps in the square of the digit.
"""

import argparse
from collections import namedtuple
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from matplotlib import colormaps
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.manifold import TSNE
from torch import Tensor, nn
from tqdm.auto import tqdm

from equireg import ClassWiseIRM, IntermediateViews, TokenTap, within_class_variance

COLORS = torch.tensor(colormaps["tab10"].colors) / 2  # one for each class, darker than ink
WIDTH, SIDE = 64, 16
# [N, 3, 16, 16] in 0 .. 1; classes and colours [N]; [N, 16, 16], 1 in the square of the digit
Scenes = namedtuple("Scenes", ("images", "labels", "contexts", "places"))


def scenes(bias: float, count: int) -> tuple[Scenes, Scenes]:
    """Training digits (60%), of which ``bias`` lie on the colour of their class, and test digits on any."""
    gray, labels = (torch.tensor(load_digits()[part][:count]) for part in ("images", "target"))
    count, gray = len(labels), gray.float() / 16
    biased = (torch.arange(count) < int(0.6 * count)) & (torch.rand(count) < bias)
    contexts = torch.where(biased, labels, torch.randint(10, labels.shape))
    ink, places = torch.zeros(2, count, SIDE, SIDE)
    for i, (y, x) in enumerate(torch.randint(SIDE - 7, (count, 2)).tolist()):
        ink[i, y : y + 8, x : x + 8], places[i, y : y + 8, x : x + 8] = gray[i], 1
    images = COLORS[contexts][:, :, None, None].lerp(torch.ones(1), ink[:, None])
    return tuple(map(Scenes, *(x.tensor_split([int(0.6 * count)]) for x in (images, labels, contexts, places))))


def small_cnn() -> nn.Module:
    """Its map, of 8 x 8 places, leaves layer "8"; its features are the mean over the map."""
    sizes = (3, 16, 1), (16, 32, 2), (32, WIDTH, 1)
    blocks = [(nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o), nn.ReLU()) for i, o, stride in sizes]
    return nn.Sequential(*sum(blocks, ()), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def train(modules: list, loss_of: Callable[[Tensor], Tensor], count: int, epochs: int, name: str) -> Iterator[None]:
    optimizer = torch.optim.AdamW((every := nn.ModuleList(modules)).parameters(), 3e-3)
    for _ in tqdm(range(epochs), name, unit="epoch"):
        every.train()
        for idx in torch.randperm(count).split(64):
            loss = loss_of(idx)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        every.eval()
        yield


def pretrained(images: Tensor, epochs: int) -> nn.Module:
    """By SimCLR, on images turned, moved and in any hue."""
    view = IntermediateViews(("se2", "color"), hue=0.5, num_intermediate=1, padding="border")
    model, loss = nn.Sequential(small_cnn(), nn.Linear(WIDTH, 64)), NTXentLoss(0.5)
    list(train([model], lambda idx: loss(*(model(view(images[idx])[0]) for _ in "12")), len(images), epochs, "SimCLR"))
    return model[0]


def finetuned(name: str, backbone: nn.Module, irm: ClassWiseIRM | None, data: Scenes, test: Scenes, epochs: int):
    """Of raw and masked features: those after each epoch, maps of the true classes, and which answers are right."""
    torch.manual_seed(torch.initial_seed())  # all start from the same head, and see the same batches
    selects = {f"{name}, raw": nn.Identity(), f"{name}, masked": irm.mask} if irm else {name: nn.Identity()}
    curves, head, (*_, select) = {part: [] for part in selects}, nn.Linear(WIDTH, 10), selects.values()

    def loss_of(idx: Tensor) -> Tensor:
        f, y = backbone(data.images[idx]), data.labels[idx]
        loss = F.cross_entropy(head(select(f)), y)
        return loss + irm(f, y, idx) if irm else loss  # the one line

    for _ in train([backbone, head, *([irm] if irm else [])], loss_of, len(data.labels), epochs, name):
        for part in selects:
            curves[part].append(selects[part](backbone(test.images)).detach())
    for part, chosen in selects.items():
        maps = activation_maps(backbone, "8", chosen, head, test.images, test.labels).relu()
        yield part, (curves[part], maps, head(curves[part][-1]).argmax(1) == test.labels)


@torch.no_grad()
def activation_maps(model: nn.Module, layer: str, select, head: nn.Linear, images: Tensor, classes: Tensor) -> Tensor:
    """CAM (Zhou et al., 2016), [B, h, w]: sum_d w_kd select(f)_d; its mean over places, plus the bias, is logit k."""
    with TokenTap(model, layer) as tap:
        model(images)
    return (select(tap.tokens) * head.weight[classes][:, None]).sum(2).unflatten(1, tap.grid)


def report(test: Scenes, found: dict[str, tuple[list[Tensor], Tensor, Tensor]], folder: Path) -> None:
    maps, tsne, variance = figures = [Figure(figsize=(10, h), layout="constrained") for h in (7.7, 5.2, 4)]
    grid, clouds, curves = maps.subplots(4, len(found) + 1), tsne.subplots(2, len(found)), variance.subplots(1, 2)
    shown, groupings = {"image": test.images.permute(0, 2, 3, 1)}, (test.labels, test.contexts)
    print(f"\n{'%':24}{'accuracy':>18}{'V in classes':>18}{'V in contexts':>18}{'maps on the digit':>18}")
    for column, (name, (features, activation, right)) in zip(clouds.T, found.items()):
        shown[name] = F.interpolate(activation[:, None], test.places.shape[1:], mode="bilinear")[:, 0]
        shares = [within_class_variance(features[-1], groups, relative=True) for groups in groupings]
        shares = [right.float().mean(), *shares, (shown[name] * test.places).sum() / shown[name].sum()]
        print(f"{name:24}" + "".join(f"{100 * share:18.1f}" for share in shares))
        points = TSNE(random_state=0).fit_transform(features[-1].numpy())
        for axes, groups, word in zip(column, groupings, ("classes", "contexts")):
            axes.scatter(*points.T, s=6, c=groups.numpy(), cmap="tab10")
            axes.set(xlabel=f"{name}: {word}", xticks=[], yticks=[])
        for axes, title, relative in zip(curves, ("variance within classes", "share of the total"), (False, True)):
            axes.plot([within_class_variance(f, test.labels, relative=relative) for f in features], label=name)
            axes.set(title=title, xlabel="epoch")
    for column, (name, pictures) in zip(grid.T, shown.items()):
        for axes, picture in zip(column, pictures):
            axes.imshow(picture.numpy(), cmap="inferno")
            axes.set(xlabel=name, xticks=[], yticks=[])
    curves[1].legend()
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in zip(("maps", "tsne", "variance"), figures):
        figure.savefig(folder / f"{name}.png", dpi=100)
        print(folder / f"{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # pretraining: epochs of SimCLR; epochs: of each fine-tuning; weight: of the penalty
    numbers = {"digits": 1797, "bias": 0.9, "pretraining": 30, "epochs": 30, "weight": 10.0, "seed": 0}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help="default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/eqinv_pictures"))
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    data, test = scenes(options.bias, options.digits)
    encoder = pretrained(data.images, options.pretraining)
    irm = ClassWiseIRM(WIDTH, 10, weight=options.weight).fit_environments(encoder(data.images).detach(), data.labels)
    runs = ("from scratch", small_cnn(), None), ("SimCLR", deepcopy(encoder), None), ("+ ClassWiseIRM", encoder, irm)
    rows = (row for run in runs for row in finetuned(*run, data, test, options.epochs))
    report(test, dict(rows), options.out)


if __name__ == "__main__":
    main()
