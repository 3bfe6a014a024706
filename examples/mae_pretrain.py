"""Pretrain a small ViT as a masked autoencoder, the base of EqInv's Table 5, and measure its features.

    python mae_pretrain.py --data folder    # folder/train/<class>/*.png and folder/test/<class>/*.png

Three quarters of the patches of an image are hidden, and a decoder predicts their pixels from what the encoder makes of
the others (He et al., CVPR 2022). It prints a table of the features before and after, and writes a picture of what was
hidden and predicted. The encoder in --out has timm's keys: the recipe fine-tunes it, with EqInv or without,

    python vipriors finetune --data folder --model test_vit --encoder runs/mae_pretrain/encoder.pt
"""

import argparse
import json
import os
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from lightly.models import utils
from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm.auto import tqdm

import equireg

WIDTH, DEPTH, HEADS = 128, 2, 4  # of the decoder
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # the recipe's
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
normalize = v2.Normalize(MEAN, STD)


def load(folder: Path, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Random images, uint8 [count, 3, size, size], and their labels."""
    classes = equireg.read_image_folder(folder.parent / "train").classes  # test images are numbered alike
    steps = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
    files = equireg.read_image_folder(folder, class_list=classes, transform=steps)
    chosen = files.take(torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[:count])
    return torch.stack([image for image, _ in tqdm(chosen, str(folder))]), chosen.labels


class MAE(nn.Module):
    def __init__(self, vit: nn.Module, hidden: float):
        super().__init__()
        self.hidden, self.patch_size = hidden, vit.patch_embed.patch_size[0]
        self.encoder = MaskedVisionTransformerTIMM(vit)
        self.embed = nn.Linear(vit.embed_dim, WIDTH)
        self.decoder = MaskedVisionTransformerDecoderTIMM(vit.patch_embed.num_patches, WIDTH, DEPTH, HEADS)
        self.predict = nn.Linear(WIDTH, 3 * self.patch_size**2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predicted and true pixels of the hidden patches [B, H, 3 p²], and which these are [B, H]."""
        shape = len(images), self.encoder.sequence_length
        seen, hidden = utils.random_token_mask(shape, self.hidden, device=images.device)
        tokens = self.embed(self.encoder.encode(images, idx_keep=seen))
        tokens = utils.set_at_index(utils.repeat_token(self.decoder.mask_token, shape), seen, tokens)
        predicted = self.predict(utils.get_at_index(self.decoder(tokens), hidden))
        patches = utils.patchify(images, self.patch_size)
        return predicted, utils.get_at_index(patches, hidden - 1), hidden - 1


def train(mae: MAE, images: Tensor, options: argparse.Namespace) -> list[float]:
    size, losses = images.shape[-1], []
    crop = v2.Compose([v2.RandomResizedCrop(size, (0.2, 1.0), interpolation=3), v2.RandomHorizontalFlip()])
    loader = DataLoader(images, options.batch_size, shuffle=True, drop_last=len(images) > options.batch_size)
    optimizer = torch.optim.AdamW(mae.parameters(), options.lr, betas=(0.9, 0.95), weight_decay=0.05)
    steps = options.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, steps, cycle_momentum=False)
    for epoch in range(1, options.epochs + 1):
        for batch in tqdm(loader, f"epoch {epoch}"):
            views = torch.stack([crop(image) for image in batch]).to(device) / 255
            predicted, pixels, _ = mae.train()(normalize(views))
            loss = F.mse_loss(predicted, pixels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return losses


@torch.no_grad()
def measure(vit: nn.Module, train_set: tuple[Tensor, Tensor], test_set: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Accuracy of the last class token, which He et al. probe too, and of the mean of the last patch tokens."""

    def tokens(images: Tensor) -> Tensor:
        found = vit.eval().forward_features(normalize(images.to(device) / 255))
        return torch.stack([found[:, 0], found[:, 1:].mean(1)]).cpu()

    (x, y), (x_test, y_test) = ((torch.cat([*map(tokens, x.split(250))], 1), y) for x, y in (train_set, test_set))
    results = {}
    for name, own, other in zip(("class token", "mean token"), x, x_test):
        results[f"k-NN, {name}, %"] = 100 * equireg.knn_accuracy(own, y, other, y_test)
        results[f"linear, {name}, %"] = 100 * equireg.linear_probe(own, y, other, y_test)
    return results


@torch.no_grad()
def draw(mae: MAE, images: Tensor, losses: list[float], path: Path) -> None:
    """Images, what the encoder sees of them, and the same with what is predicted in the places of the rest."""
    images = normalize(images.to(device) / 255)
    predicted, _, hidden = mae.eval()(images)
    patches, gray = utils.patchify(images, mae.patch_size), torch.zeros_like(predicted)
    rows = {"image": patches, "seen": utils.set_at_index(patches, hidden, gray)}
    rows["predicted"] = utils.set_at_index(patches, hidden, predicted)
    curve, pictures = (figure := Figure(figsize=(10, 3), layout="constrained")).subplots(1, 2, width_ratios=(1, 3))
    curve.plot(losses)
    curve.set(title="loss by step", xlabel="step")
    strips = [torch.cat([*utils.unpatchify(row, mae.patch_size)], 2) for row in rows.values()]
    pixels = torch.cat(strips, 1).permute(1, 2, 0).cpu() * torch.tensor(STD) + torch.tensor(MEAN)
    pictures.imshow(pixels.clamp(0, 1).numpy())
    pictures.set_yticks([images.shape[-1] * (place + 0.5) for place in range(3)], list(rows))
    pictures.set_xticks([])
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.getenv("EQUIREG_DATA", "."), "tiny-vipriors64"))
    numbers = {"images": 4000, "epochs": 40, "batch-size": 100, "lr": 1e-3, "seed": 0, "image-size": 64}
    numbers |= {"patch-size": 8, "hidden": 0.75}  # share of the patches
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help="default %(default)s")
    parser.add_argument("--model", default="test_vit", help="of timm; the paper has vit_base_patch16_224")
    parser.add_argument("--out", type=Path, default=Path("runs/mae_pretrain"))
    options = parser.parse_args()
    sizes = {"img_size": options.image_size, "patch_size": options.patch_size, "dynamic_img_size": True}
    train_set = load(options.data / "train", options.images, options.image_size)
    test_set = load(options.data / "test", 2000, options.image_size)
    torch.manual_seed(options.seed)
    vit = timm.create_model(options.model, num_classes=0, **sizes)
    mae = MAE(vit, options.hidden).to(device)
    results = {"before": measure(vit, train_set, test_set)}
    losses = train(mae, train_set[0], options)
    results["after"] = measure(vit, train_set, test_set)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.save(vit.state_dict(), options.out / "encoder.pt")
    same = {"model": options.model, "patch_size": options.patch_size, "late_class_token": 0}
    (options.out / "options.json").write_text(json.dumps(same))  # the recipe compares its own with them
    print(f"\n{'':28}" + "".join(f"{name:>14}" for name in results))
    for key in results["after"]:
        print(f"{key:28}" + "".join(f"{result[key]:14.2f}" for result in results.values()))
    draw(mae, test_set[0][:10], losses, options.out / "mae.png")


if __name__ == "__main__":
    main()
