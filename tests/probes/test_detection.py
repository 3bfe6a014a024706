import math
import random

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from equireg import detection_probe, read_voc
from equireg.probes import detection
from equireg.probes._maps import MOVES
from equireg.probes.detection import mean_average_precision
from tests.image_trees import make_voc

QUIET = {"progress": False}
A, B, C = [0, 0, 4, 4], [10, 0, 14, 4], [0, 10, 4, 14]


# ------------------------------------------------------------------------------------------------ average precision


def truth(*boxes, labels=None, difficult=None):
    count = len(boxes)
    labels, difficult = labels or [0] * count, difficult or [False] * count
    return torch.tensor(boxes).float().view(-1, 4), torch.tensor(labels).long(), torch.tensor(difficult).bool()


def answer(*boxes, labels=None):
    """With falling scores."""
    return (*truth(*boxes, labels=labels)[:2], 0.9 - 0.1 * torch.arange(len(boxes)))


@pytest.mark.parametrize(
    ("found", "truths", "expected"),
    [
        (answer(A, B), truth(A, B), 1.0),
        (answer(), truth(A, B), 0.0),
        (answer(A), truth(A, B), 1 / 2),  # a miss
        (answer(A, A, B), truth(A, B), (1 + 2 / 3) / 2),  # a duplicate
        (answer(C, A, B), truth(A, B), (2 / 3 + 2 / 3) / 2),  # the later precision is the higher one
        (answer(A, B, C), truth(A, B), 1.0),  # a false one after all have been found
        (answer([0, 0, 4, 2], B), truth(A, B), 1.0),  # an IoU of a half
        (answer([0, 0, 4, 1.9], B), truth(A, B), 1 / 4),  # found at rank 2 alone
        (answer(A, B, labels=[0, 0]), truth(A, B, labels=[0, 1]), 1 / 2),  # the class of B finds nothing
        (answer(A, B, labels=[1, 1]), truth(A, B, labels=[1, 1]), 1.0),  # class 0 does not occur
        (answer(A, A, B), truth(A, B, difficult=[True, False]), 1.0),  # neither right nor wrong, however often
    ],
)
def test_average_precision_of_cases_on_paper(found, truths, expected):
    assert mean_average_precision([found], [truths], 2) == pytest.approx(expected, abs=1e-12)


def scenes_of_boxes(count=30, classes=3, seed=0):
    """Boxes near those of a scene, far from them, and twice; scores at random."""
    generator = torch.Generator().manual_seed(seed)
    found, truths = [], []
    for _ in range(count):
        size = 5 + 10 * torch.rand(4, 2, generator=generator)
        corner = torch.tensor([[0.0, 0.0], [40.0, 0.0], [0.0, 40.0], [40.0, 40.0]])
        boxes = torch.cat((corner, corner + size), 1)
        labels = torch.randint(classes, (4,), generator=generator)
        near = boxes.repeat(3, 1) + 1.5 * torch.randn(12, 4, generator=generator)
        said = torch.where(torch.rand(12, generator=generator) < 0.8, labels.repeat(3), 0)
        found.append((near, said, torch.rand(12, generator=generator)))
        truths.append((boxes, labels, torch.rand(4, generator=generator) < 0.2))
    return found, truths


def test_average_precision_is_that_of_a_loop():
    found, truths = scenes_of_boxes()

    def iou(a, b):
        both = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
        return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)

    means = []
    for c in range(3):
        ranked = [
            (score, n, box)
            for n, parts in enumerate(found)
            for box, label, score in zip(*(part.tolist() for part in parts))
            if label == c
        ]
        things = {
            (n, k): (box, hard)
            for n, parts in enumerate(truths)
            for k, (box, label, hard) in enumerate(zip(*(part.tolist() for part in parts)))
            if label == c
        }
        count, taken, right, wrong, points = sum(not hard for _, hard in things.values()), set(), 0, 0, []
        for _, n, box in sorted(ranked, reverse=True):
            overlaps = {place: iou(box, other) for place, (other, _) in things.items() if place[0] == n}
            best = max(overlaps, key=overlaps.get, default=None)
            if best and overlaps[best] >= 0.5:
                if things[best][1]:
                    continue
                right, wrong = (right, wrong + 1) if best in taken else (right + 1, wrong)
                taken.add(best)
            else:
                wrong += 1
            points.append((right / count, right / (right + wrong)))
        levels = [k / count for k in range(1, count + 1)]
        means.append(sum(max((p for r, p in points if r >= level - 1e-9), default=0) for level in levels) / count)
    expected = sum(means) / 3
    assert 0.2 < expected < 0.9
    assert mean_average_precision(found, truths, 3) == pytest.approx(expected, abs=1e-9)


def test_average_precision_is_that_of_coco_but_for_its_steps():
    """COCO reads precision at 101 recalls instead of at every one."""
    pytest.importorskip("pycocotools", reason="torchmetrics needs it")
    metric = pytest.importorskip("torchmetrics.detection").MeanAveragePrecision(iou_thresholds=[0.5])
    found, truths = scenes_of_boxes(100)
    truths = [(boxes, labels, torch.zeros_like(hard)) for boxes, labels, hard in truths]
    metric.update(
        [{"boxes": boxes, "labels": labels, "scores": scores} for boxes, labels, scores in found],
        [{"boxes": boxes, "labels": labels} for boxes, labels, _ in truths],
    )
    assert mean_average_precision(found, truths, 3) == pytest.approx(float(metric.compute()["map"]), abs=0.01)


# ---------------------------------------------------------------------------------------------------------- the probe


def rectangles(count=16, classes=2, size=(32, 48), seed=0):
    """Images whose channels are the classes, with a rectangle in each half; and their targets."""
    rng = random.Random(seed)  # noqa: S311
    images, targets = torch.zeros(count, classes, *size), []
    for image in images:
        boxes, labels = [], []
        for left in (0, size[1] // 2):
            width, height = rng.randint(9, 20), rng.randint(9, 24)
            x, y = left + rng.randint(0, size[1] // 2 - width - 1), rng.randint(0, size[0] - height)
            labels.append(rng.randrange(classes))
            boxes.append([x, y, x + width, y + height])
            image[labels[-1], y : y + height, x : x + width] = 1
        targets.append({"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels)})
    return images, targets


def halves(images, targets):
    half = len(images) // 2
    return [(images[:half], targets[:half])], [(images[half:], targets[half:])]


def runs(shown):
    """How many pixels in a row, up to each one, are of an object."""
    found = [torch.zeros_like(shown[..., 0])]
    for column in shown.unbind(-1):
        found.append((found[-1] + 1) * column)
    return torch.stack(found[1:], -1)


def seen(images):
    """At each place of 4 x 4 pixels the classes, and the logarithms of how far their rectangle reaches to each side."""
    shown, down = images.sum(1), images.sum(1).mT
    left, right = runs(shown)[:, 2::4, 1::4], runs(shown.flip(-1)).flip(-1)[:, 2::4, 2::4]
    above, below = runs(down).mT[:, 1::4, 2::4], runs(down.flip(-1)).flip(-1).mT[:, 2::4, 2::4]
    sides = torch.stack((left, above, right, below), 1)
    return torch.cat((images[:, :, 2::4, 2::4], sides.clamp(min=0.5).log()), 1)


def test_tokens_that_know_the_sides_of_objects_score_one_whichever_way_up():
    images, targets = rectangles()
    for encode in (seen, lambda images: seen(images).flatten(2).transpose(1, 2)):  # [B, D, h, w] and [B, T, D]
        found = detection_probe(encode, *halves(images, targets), 2, **QUIET)
        assert found == {"upright": 1.0, "90": 1.0, "180": 1.0, "flip": 1.0}
    with torch.inference_mode():
        assert detection_probe(seen, *halves(images, targets), 2, **QUIET)["upright"] == 1.0


def test_tokens_that_call_a_side_left_whichever_way_up_lose_when_turned():
    """Maps that turn as a whole: upright sides at moved places."""
    images, targets = rectangles()
    maps = seen(images)
    found = detection_probe(lambda maps: maps, *halves(*scaled(maps, targets, 1 / 4)), 2, **QUIET)
    assert found["upright"] == 1.0
    assert all(0.0 < found[name] < 0.8 for name in ("90", "180", "flip"))


def scaled(images, targets, by):
    return images, [{**target, "boxes": by * target["boxes"]} for target in targets]


def test_difficult_boxes_do_not_count():
    images, targets = rectangles()
    (train,), (test,) = halves(images, targets)
    for image, target in zip(*test):  # nothing is there to be found
        x1, y1, x2, y2 = target["boxes"][1].int().tolist()
        image[:, y1:y2, x1:x2] = 0
        target["difficult"] = torch.tensor([False, True])
    assert detection_probe(seen, [train], [test], 2, **QUIET)["upright"] == 1.0
    for target in test[1]:
        del target["difficult"]
    assert detection_probe(seen, [train], [test], 2, **QUIET)["upright"] < 0.7


@pytest.mark.parametrize("name", MOVES)
def test_boxes_move_with_their_image(name):
    image = torch.zeros(1, 6, 9)
    image[:, 1:3, 2:7] = 1
    (box,) = detection._BOX_MOVES[name](torch.tensor([[2.0, 1.0, 7.0, 3.0]]), 6, 9).int().tolist()
    moved, (x1, y1, x2, y2) = MOVES[name](image), box
    assert moved[:, y1:y2, x1:x2].all()
    assert (x2 - x1) * (y2 - y1) == moved.sum() == 10


def test_what_places_learn_is_that_of_a_loop():
    """The smallest box that holds the centre, not farther than a stride from the box's own, in units of the stride."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(6, 3, 24, 40)
    targets = []
    for _ in images:
        corner = torch.rand(5, 2, generator=generator) * torch.tensor([20.0, 8.0])
        boxes = torch.cat((corner, corner + 3 + 13 * torch.rand(5, 2, generator=generator)), 1)
        targets.append({"boxes": boxes, "labels": torch.randint(4, (5,), generator=generator)})
    targets[2] = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}
    encode = lambda images: F.avg_pool2d(images, (4, 8))  # noqa: E731
    found = detection._training_places(encode, [(images, targets)], 4, torch.device("cpu"), False)
    classes, distances = (part.unflatten(0, (6, 6, 5)).tolist() for part in found[1:])
    several = 0
    for n, target in enumerate(targets):
        for i in range(6):
            for j in range(5):
                x, y, holding = 8 * (j + 0.5), 4 * (i + 0.5), []
                for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist()):
                    if x1 < x < x2 and y1 < y < y2 and abs(x - (x1 + x2) / 2) <= 8 and abs(y - (y1 + y2) / 2) <= 4:
                        sides = [(x - x1) / 8, (y - y1) / 4, (x2 - x) / 8, (y2 - y) / 4]
                        holding.append(((x2 - x1) * (y2 - y1), label, sides))
                several += len(holding) > 1
                assert classes[n][i][j] == (min(holding)[1] if holding else 4)
                if holding:
                    assert distances[n][i][j] == pytest.approx(min(holding)[2], abs=1e-5)
    assert several > 10


# ------------------------------------------------------------------------------------------------------- real images


def pasted(real_images, folder, split, streets, count, seed):
    """Street scenes with one or two objects of CIFAR-10 pasted on them, in Pascal VOC's layout."""
    rng = random.Random(seed)  # noqa: S311
    scenes = sorted((real_images / "camvid128" / streets / "images").glob("*.jpg"))
    kinds = {
        kind: sorted((real_images / "cifar10" / split / kind).glob("*.jpg"))[:200] for kind in ("airplane", "frog")
    }
    for number in range(count):
        objects = []
        with Image.open(rng.choice(scenes)) as scene:
            image = scene.convert("RGB")
        for left in rng.choice([[0], [64], [0, 64]]):
            kind, side = rng.choice(sorted(kinds)), rng.randint(24, 44)
            x, y = left + rng.randint(0, 64 - side), rng.randint(0, image.height - side)
            with Image.open(rng.choice(kinds[kind])) as thing:
                image.paste(thing.resize((side, side)), (x, y))
            objects.append((kind, x + 1, y + 1, x + side, y + side, False))
        make_voc(folder, f"{number:03}", image, objects)
    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    images, targets = zip(*read_voc(folder, transform=transform, **QUIET))
    return torch.stack(images), targets


class Network(nn.Module):
    """Untrained convolutions with a stride of 8, whose mode is to be kept."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 32, 5, 2, 2), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(32, 64, 5, 2, 2), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(64, 128, 5, 1, 2), nn.ReLU(), nn.Dropout(0.9))

    def forward(self, images):
        assert not self.training
        return self.layers(images)


def test_objects_on_street_scenes(real_images, tmp_path):
    """Random convolutions find some of them; boxes of other scenes teach next to nothing."""
    train = pasted(real_images, tmp_path / "train", "train", "train", 120, seed=0)
    test = pasted(real_images, tmp_path / "test", "test", "test", 50, seed=1)
    network, state = Network().train(), torch.get_rng_state()
    options = {"max_iterations": 30, **QUIET}
    found = detection_probe(network, [train], [test], 2, **options)
    assert network.training
    assert torch.equal(torch.get_rng_state(), state)
    wrong = (train[0], [*train[1][1:], train[1][0]])
    by_chance = detection_probe(network, [wrong], [test], 2, **options)
    assert found["upright"] > 0.2
    assert min(found.values()) > 0.1
    assert by_chance["upright"] < 0.1


# ---------------------------------------------------------------------------------------------------------- refusals


IMAGES, TARGETS = rectangles(4)
BOXES, LABELS = TARGETS[0]["boxes"], TARGETS[0]["labels"]


def loader(**changes):
    return [(IMAGES[:1], [{"boxes": BOXES, "labels": LABELS, **changes}])]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encode": None}, "encode must be a module or a function, got NoneType"),
        ({"encode": lambda x: x.flatten(1)}, r"encode\(images\) must be \[B, T, D\], got \[4, 3072\]"),
        ({"encode": lambda x: seen(x) * math.nan}, r"encode\(images\) must be finite"),
        ({"train_loader": []}, "train_loader must be of at least one batch, got none"),
        ({"loader": []}, "loader must be of at least one batch, got none"),
        ({"loader": [IMAGES]}, r"loader must be a loader of \(images, targets\), got Tensor"),
        ({"loader": [(IMAGES, TARGETS[1:])]}, "targets of loader must be a list of 4 dicts, one for each image, got 3"),
        ({"loader": [(IMAGES, BOXES)]}, "targets of loader must be a list of 4 dicts, one for each image, got Tensor"),
        ({"loader": [(IMAGES[:1], [BOXES])]}, 'loader\'s target must be a dict with "boxes" and "labels", got Tensor'),
        ({"loader": [(IMAGES[:1], [{"boxes": BOXES}])]}, r"loader's target must be a dict .*, got \['boxes'\]"),
        ({"loader": loader(boxes=BOXES[:, :3])}, r"boxes of loader's target must be \[N, 4\], got \[2, 3\]"),
        ({"loader": loader(labels=LABELS[:1])}, r"labels of loader's target must be \[N\] = \[2\], got \[1\]"),
        ({"loader": loader(labels=LABELS + 2)}, r"labels of loader's target must be in 0 .. 1 \(num_classes\)"),
        ({"loader": loader(difficult=LABELS)}, "difficult of loader's target must be a bool tensor, got torch.int64"),
        (
            {"train_loader": loader(boxes=BOXES + 40)},
            "boxes of train_loader's target must be corners x1 < x2, y1 < y2 inside of images of 32 x 48, got",
        ),
        ({"train_loader": loader(boxes=BOXES.flip(1))}, "boxes of train_loader's target must be corners x1 < x2"),
        ({"train_loader": loader(boxes=BOXES * math.nan)}, "boxes of train_loader's target must be corners x1 < x2"),
        (
            {"train_loader": loader(boxes=torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2))},
            "train_loader must be of targets with at least one box that holds the centre of a place, got none",
        ),
        (
            {"loader": loader(difficult=torch.tensor([True, True]))},
            "loader must be of targets with at least one box that is not difficult, got none",
        ),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"weight_decay": -1}, "weight_decay must be finite and at least 0"),
        ({"max_iterations": 0}, "max_iterations must be at least 1"),
    ],
)
def test_refuses(changes, message):
    arguments = {"encode": seen, "train_loader": [(IMAGES, TARGETS)], "loader": [(IMAGES, TARGETS)], "num_classes": 2}
    with pytest.raises((TypeError, ValueError), match=f"^detection_probe: {message}"):
        detection_probe(**{**arguments, **QUIET, "max_iterations": 5, **changes})
