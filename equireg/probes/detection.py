"""Object detection by a linear map on frozen tokens, upright and turned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from equireg._checks import Arguments
from equireg.features import check_callable, frozen
from equireg.probes._features import standardizer
from equireg.probes._linear import fit_linear, linear
from equireg.probes._maps import MOVES, image_batches, token_map

__all__ = ["detection_probe"]

_CANDIDATES, _KEPT, _OVERLAP = 1000, 100, 0.6  # of an image: FCOS's, before and after non-maximum suppression
_LARGEST = math.log(1000.0)  # a box's side in strides; bounds the line search, as torchvision's detectors do

# Corners x1, y1, x2, y2 of boxes, moved as MOVES moves an image of H x W.
_BOX_MOVES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "upright": lambda box, h, w: box,
    "90": lambda box, h, w: torch.stack((box[:, 1], w - box[:, 2], box[:, 3], w - box[:, 0]), 1),
    "180": lambda box, h, w: torch.stack((w - box[:, 2], h - box[:, 3], w - box[:, 0], h - box[:, 1]), 1),
    "flip": lambda box, h, w: torch.stack((w - box[:, 2], box[:, 1], w - box[:, 0], box[:, 3]), 1),
}


@torch.no_grad()
def detection_probe(
    encode: Callable[[Tensor], Tensor],
    train_loader: Iterable[Any],
    loader: Iterable[Any],
    num_classes: int,
    *,
    weight_decay: float = 1e-3,
    max_iterations: int = 100,
    progress: bool = True,
) -> dict[str, float]:
    r"""Average precision of boxes from a linear map on frozen tokens, on images upright, turned and flipped.

    One linear map with FCOS's outputs (Tian et al., 2019), fitted on upright images alone. Each place of the token map,
    with its centre :math:`(x, y)` and a stride of s pixels, gives a logit for each class and four distances:

    .. math::
        \text{box} = (x - l,\; y - t,\; x + r,\; y + b), \qquad
        (l, t, r, b) = s \exp(W f(\rho_g(x)) + w_0)

    A place learns the smallest box that holds its centre within a stride of the box's own, or no class: the focal loss
    of the logits (Lin et al., 2017), summed over places and divided by the number of places with a box, and the mean
    generalised-IoU loss of their boxes (Rezatofighi et al., 2019). There is no centreness, since places far from a
    box's centre do not learn it: a place's score is its class's probability. Features are standardised and weights
    found by L-BFGS from zero, as in ``linear_probe``: without a learning rate or a seed. All training tokens are held
    in memory.

    Of each image the 100 boxes with the highest scores remain after non-maximum suppression within classes, at an IoU
    of 0.6. The measure is Pascal VOC's since 2010. A box is right if the true box of its class that it overlaps most
    has an IoU of at least 0.5 with it, and no box with a higher score has found that one. For a class with n true
    boxes, and the precision :math:`p(k)` down to the score at which k of them are found, 0 where so many never are,

    .. math:: \text{AP} = \frac{1}{n} \sum_{k=1}^{n} \max_{j \ge k} p(j)

    and the result is the mean over the classes that occur.

    Boxes turn with their image, by their corners. Left and right distances then change their roles, so features that do
    nothing but move with the image do not suffice: they must tell towards which side an object lies. A box that holds
    no centre of a place cannot be found.

    Args:
        encode: images [B, C, H, W] to tokens [B, T, D], row by row of a grid with the image's aspect, or to a map
            [B, D, h, w]. With ``TokenTap``, a function that runs the model and returns ``tap.tokens``. It runs in eval
            mode, also on images whose sides are swapped by a quarter turn.
        train_loader: batches (images, targets) to fit on. A target is a dict for each image, as for torchvision's
            detectors: "boxes" [N, 4], corners x1, y1, x2, y2 in pixels; "labels" [N], whole numbers from 0; and
            optionally "difficult", bool [N]: such boxes are learnt, but whether they are found does not count.
        loader: batches (images, targets) to measure on.
        num_classes: C, with classes 0 .. C - 1; there is no class for the background.
        weight_decay: at least 0.
        max_iterations: of L-BFGS, for each of the two maps.
        progress: whether to show bars, where tqdm is installed.

    Returns:
        The average precision at an IoU of 0.5, 0 to 1: "upright"; "90" and "180", turned counter-clockwise; "flip",
        left to right.

    Raises:
        TypeError, ValueError: batches that are not (images, targets), boxes that are empty or leave their image, other
            labels, tokens that fit no grid, no box.

    Example:
        >>> images = torch.zeros(8, 2, 32, 48)
        >>> targets = []
        >>> for n in range(8):  # a square in the colour of its class
        ...     x, y, c = 4 * n, 2 * n, n % 2
        ...     images[n, c, y : y + 16, x : x + 16] = 1
        ...     box = torch.tensor([[x, y, x + 16.0, y + 16.0]])
        ...     targets.append({"boxes": box, "labels": torch.tensor([c])})
        >>> def encode(images):  # the square around each token
        ...     return torch.nn.functional.unfold(images, 36, padding=16, stride=4).transpose(1, 2)
        >>> batch = (images, targets)
        >>> found = detection_probe(encode, [batch], [batch], 2, progress=False)
        >>> list(found), found["upright"]
        (['upright', '90', '180', 'flip'], 1.0)
    """
    check = Arguments("detection_probe")
    check_callable(check, "encode", encode)
    check.count("num_classes", num_classes)
    check.not_negative("weight_decay", weight_decay)
    check.count("max_iterations", max_iterations)
    found: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in MOVES}
    truths: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in MOVES}
    with frozen(encode) as device:
        x, classes, distances = _training_places(encode, train_loader, num_classes, device, progress)
        standardize = standardizer(x)
        head = _fit(standardize(x), classes, distances, num_classes, weight_decay, max_iterations)
        for images, targets in _batches("loader", loader, num_classes, progress):
            for name, move in MOVES.items():
                moved = move(images)
                tokens = token_map("detection_probe", encode, moved.to(device))
                logits, logs = linear(standardize(tokens.permute(0, 2, 3, 1)), *head).split([num_classes, 4], -1)
                centres, stride = _places(tokens, moved)
                for scores, log in zip(logits.flatten(1, 2).sigmoid().cpu(), logs.flatten(1, 2).cpu()):
                    boxes = _boxes(centres, stride * log.exp()).clamp(min=0)
                    boxes = boxes.minimum(torch.tensor(moved.shape[2:]).flip(0).repeat(2))
                    found[name].append(_best(boxes, scores))
                truths[name] += [(_BOX_MOVES[name](box, *images.shape[2:]), *rest) for box, *rest in targets]
    if not any(len(labels) > int(difficult.sum()) for _, labels, difficult in truths["upright"]):
        check.fail("loader", "of targets with at least one box that is not difficult", "none")
    return {name: mean_average_precision(found[name], truths[name], num_classes) for name in MOVES}


def mean_average_precision(
    found: list[tuple[Tensor, ...]], truths: list[tuple[Tensor, ...]], num_classes: int
) -> float:
    """Of each image's (boxes, labels, scores) against its (boxes, labels, difficult): the mean over classes that occur.

    The rules are Pascal VOC's, as ``detection_probe`` says. Boxes that find a difficult one are left out.
    """
    from torchvision.ops import box_iou

    precisions = []
    for c in range(num_classes):
        scores, right, count = [], [], 0
        for (boxes, labels, score), (true_boxes, true_labels, difficult) in zip(found, truths):
            of_class, hard = true_labels == c, difficult[true_labels == c]
            count += int((~hard).sum())
            order = score[labels == c].argsort(descending=True, stable=True)
            overlaps = box_iou(boxes[labels == c][order].double(), true_boxes[of_class].double())
            taken = torch.zeros_like(hard)
            for value, row in zip(score[labels == c][order].tolist(), overlaps):
                hit = len(row) > 0 and bool(row.max() >= 0.5)
                place = int(row.argmax()) if hit else 0
                if hit and hard[place]:
                    continue
                scores.append(value)
                right.append(hit and not taken[place])
                if hit:
                    taken[place] = True
        if count:
            order = torch.tensor(scores, dtype=torch.float64).argsort(descending=True, stable=True)
            rights = torch.tensor(right, dtype=torch.float64)[order]
            precision = rights.cumsum(0) / torch.arange(1, len(rights) + 1)
            best_from = precision.flip(0).cummax(0).values.flip(0) if len(rights) else precision
            precisions.append(float((rights * best_from).sum()) / count)
    return sum(precisions) / len(precisions)


def _fit(
    x: Tensor, classes: Tensor, distances: Tensor, num_classes: int, weight_decay: float, max_iterations: int
) -> tuple[Tensor, Tensor]:
    """Weight [C + 4, D] and bias [C + 4] of the logits and of the logarithms of the distances in strides."""
    from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

    with torch.inference_mode(False):  # for the gradients, which inference tensors cannot serve
        some = classes < num_classes
        y = F.one_hot(classes, num_classes + 1)[:, :num_classes].to(x)
        positive, origin, strides = x[some], torch.zeros_like(distances[some, :2]), distances[some]
        boxes = _boxes(origin, strides)

    def focal(logits: Tensor) -> Tensor:
        loss: Tensor = sigmoid_focal_loss(logits, y, reduction="sum") / len(positive)
        return loss

    def giou(logs: Tensor) -> Tensor:
        made = _boxes(origin, logs.clamp(max=_LARGEST).exp())
        loss: Tensor = generalized_box_iou_loss(made, boxes, reduction="mean")
        return loss

    # Each bias begins where it would be without features.
    share, sides = y.mean(0).clamp(1e-4, 1 - 1e-4), strides.clamp(min=1e-3)
    parts = [
        fit_linear(x, focal, share.logit(), weight_decay, max_iterations),
        fit_linear(positive, giou, sides.log().mean(0), weight_decay, max_iterations),
    ]
    weight, bias = (torch.cat(part) for part in zip(*parts))
    return weight, bias


def _training_places(
    encode: Callable[[Tensor], Tensor], loader: Iterable[Any], num_classes: int, device: torch.device, progress: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [N, D] of all places, their classes [N], C where they hold none, and their distances [N, 4] in strides."""
    features, classes, distances = [], [], []
    for images, targets in _batches("train_loader", loader, num_classes, progress):
        tokens = token_map("detection_probe", encode, images.to(device))
        features.append(tokens.permute(0, 2, 3, 1).flatten(0, 2))
        centres, stride = _places(tokens, images)
        for boxes, labels, _ in targets:
            sides = torch.cat((centres[:, None] - boxes[:, :2], boxes[:, 2:] - centres[:, None]), 2)  # [places, N, 4]
            area = (boxes[:, 2:] - boxes[:, :2]).prod(1).expand(sides.shape[:2])
            off_centre = (sides[..., :2] - sides[..., 2:]).abs() / 2
            held = (sides.amin(2) > 0) & (off_centre <= stride[:2]).all(2)
            area = torch.where(held, area, math.inf)
            # One box more, of the places that lie in none.
            place = F.pad(area, (0, 1), value=torch.finfo(area.dtype).max).argmin(1)
            classes.append(F.pad(labels, (0, 1), value=num_classes)[place])
            distances.append(F.pad(sides, (0, 0, 0, 1), value=1.0)[torch.arange(len(place)), place] / stride)
    x, y, t = torch.cat(features), torch.cat(classes), torch.cat(distances)
    if not bool((y < num_classes).any()):
        rule = "of targets with at least one box that holds the centre of a place"
        Arguments("detection_probe").fail("train_loader", rule, "none")
    Arguments("detection_probe").finite("encode(images)", x)
    return x, y.to(x.device), t.to(x.device)


def _batches(
    name: str, loader: Iterable[Any], num_classes: int, progress: bool
) -> Iterable[tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]]:
    """The images of each batch, and the boxes, labels and difficulty of each image, checked, on the CPU."""
    for check, images, targets in image_batches("detection_probe", name, loader, "targets", progress):
        listed = isinstance(targets, (tuple, list))
        if not listed or len(targets) != len(images):
            got = f"{len(targets)}" if listed else type(targets).__name__
            check.fail(f"targets of {name}", f"a list of {len(images)} dicts, one for each image", got)
        yield images, [_target(f"{name}'s target", target, images, num_classes) for target in targets]


def _target(name: str, target: Any, images: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    check = Arguments("detection_probe")
    if not isinstance(target, dict) or not {"boxes", "labels"} <= set(target):
        got = sorted(target) if isinstance(target, dict) else type(target).__name__
        check.fail_type(name, 'a dict with "boxes" and "labels"', got)
    check.sizes["4"] = 4
    # A tv_tensor becomes a plain tensor.
    boxes = check.features(f"boxes of {name}", target["boxes"], "N 4").detach().as_subclass(Tensor).cpu().float()
    labels = check.integers(f"labels of {name}", target["labels"], "N").cpu()
    check.below(f"labels of {name}", labels, num_classes, "num_classes")
    difficult = torch.zeros_like(labels, dtype=torch.bool)
    if "difficult" in target:
        difficult = check.booleans(f"difficult of {name}", target["difficult"], "N").cpu()
    size = torch.tensor([images.shape[3], images.shape[2]])
    # Resized corners may overshoot by a rounding error.
    outside = (boxes[:, :2] < -0.5) | (boxes[:, 2:] > size + 0.5) | ~(boxes[:, :2] < boxes[:, 2:])
    if outside.any():
        rule = f"corners x1 < x2, y1 < y2 inside of images of {images.shape[2]} x {images.shape[3]}"
        check.fail(f"boxes of {name}", rule, boxes[outside.any(1)][0].tolist())
    return boxes, labels, difficult


def _places(tokens: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """The centres [h * w, 2] of a map's places, x and y in pixels, and the strides of the distances, [4]."""
    (h, w), (height, width) = tokens.shape[2:], images.shape[2:]
    stride = torch.tensor([width / w, height / h])
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return (torch.stack((x, y), 2).flatten(0, 1) + 0.5) * stride, stride.repeat(2)


def _boxes(centres: Tensor, distances: Tensor) -> Tensor:
    """Corners [N, 4] of the boxes with distances l, t, r, b from their centres [N, 2]."""
    return torch.cat((centres - distances[:, :2], centres + distances[:, 2:]), 1)


def _best(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, labels and scores of an image that remain, of the boxes [P, 4] and scores [P, C] of all its places."""
    from torchvision.ops import batched_nms

    score, candidate = scores.flatten().topk(min(_CANDIDATES, scores.numel()))
    place, label = candidate // scores.shape[1], candidate % scores.shape[1]
    kept = batched_nms(boxes[place], score, label, _OVERLAP)[:_KEPT]
    return boxes[place[kept]], label[kept], score[kept]
