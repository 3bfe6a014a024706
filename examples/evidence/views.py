"""Augmentation of a whole batch at once, each image by parameters of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from equireg import IntermediateViews

JITTER = IntermediateViews("color", saturation=0.4)


def crops(images: Tensor, size: int, smallest: float, largest: float = 1.0) -> Tensor:
    """Random crops of a share of the area between two limits, half of them flipped: [B, 3, size, size]."""
    count, (height, width) = len(images), images.shape[2:]
    area = torch.empty(count).uniform_(smallest, largest)
    ratio = torch.empty(count).uniform_(0.75, 1.33).sqrt()
    across, down = ((area.sqrt() * part).clamp(max=1) for part in (ratio, 1 / ratio))
    left, top = torch.rand(count) * (1 - across), torch.rand(count) * (1 - down)
    boxes = torch.stack([left * width, top * height, (left + across) * width, (top + down) * height], 1)
    boxes = torch.cat([torch.arange(count)[:, None], boxes], 1).to(images.device)
    found = roi_align(images, boxes, size, aligned=True)
    flipped = torch.rand(count, device=images.device) < 0.5
    return torch.where(flipped[:, None, None, None], found.flip(3), found)


def moved(images: Tensor) -> Tensor:
    """Images moved by up to an eighth, brighter or darker, with noise: all but the colour changes."""
    move = torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1)
    move[:, :, 2] = torch.empty(len(images), 2).uniform_(-0.25, 0.25)  # of half a side
    found = F.grid_sample(images, F.affine_grid(move, list(images.shape), align_corners=False), align_corners=False)
    brightness = torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(0.6, 1.4)
    return brightness * found + 0.1 * torch.randn_like(found)


def simclr_colors(images: Tensor) -> Tensor:
    """Jitter of four fifths of the images, and a fifth gray: SimCLR's policy, without its blur."""

    def some(share: float) -> Tensor:
        return torch.rand(len(images), 1, device=images.device) < share

    drawn = JITTER.draw(len(images), tuple(images.shape[2:])).to(images.device)
    drawn = torch.where(some(0.8), drawn, JITTER.at(drawn, 0.0))
    saturation = JITTER.parameter_names.index("saturation")
    drawn[:, saturation : saturation + 1].masked_fill_(some(0.2), 0.0)
    return JITTER.transform(images.clamp(0, 1), drawn)
