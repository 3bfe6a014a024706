"""Self-supervised methods on lightly's losses and heads, to be copied beside the pretraining examples.

Each takes views of images and returns its loss and the tokens of the views, for a regularizer beside it. A backbone
here is a module with ``backbone(images, return_tokens=True) -> features [B, D], tokens [B, T, D]``; the methods that
hide patches call it with ``mask=`` [B, T] as well.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from lightly.loss import BarlowTwinsLoss, DINOLoss, IBOTPatchLoss, KoLeoLoss, VICRegLoss
from lightly.models.modules.heads import (
    BarlowTwinsProjectionHead,
    BYOLPredictionHead,
    DINOProjectionHead,
    MoCoProjectionHead,
    VICRegProjectionHead,
)
from lightly.models.utils import concat_all_gather, random_block_mask, update_momentum
from torch import Tensor, nn
from training import MEAN, STD, cosine, precision


class Method(nn.Module):
    """A self-supervised method. The first two views are global; the others are seen by the student alone.

    ``invariant`` takes the part of the features that the method is to have; the default is all of them.
    """

    clip = 0.0  # largest norm of the gradient; 0 for any
    masks = False  # whether patches are hidden from the student

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        options: argparse.Namespace,
        invariant: Callable[[Tensor], Tensor] = lambda features: features,
    ):
        super().__init__()
        self.backbone, self.width, self.options, self.invariant = backbone, width, options, invariant

    def tokens(self, backbone: nn.Module, view: Tensor, **mask: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(part, device=view.device).view(1, 3, 1, 1) for part in (MEAN, STD))
        with precision(self.options, view.device):
            return backbone((view - mean) / std, return_tokens=True, **mask)

    def embed(self, head: nn.Module, features: Tensor) -> Tensor:
        """In fp32."""
        with precision(self.options, features.device):
            return head(self.invariant(features)).float()

    def encode(self, backbone: nn.Module, head: nn.Module, view: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings, and the token map."""
        features, tokens = self.tokens(backbone, view)
        return self.embed(head, features), tokens

    def update(self, step: int, steps: int) -> None:
        """After each step of the optimizer."""

    def before_step(self, epoch: int) -> None:
        """Before each step of the optimizer."""


class MoCoV3(Method):
    """Chen, Xie and He, 2021: each view predicts the other's key, against the keys of the batch."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        hidden = self.options.hidden_dim
        self.projector = MoCoProjectionHead(self.width, hidden, 256, num_layers=3, batch_norm=True)
        self.predictor = BYOLPredictionHead(256, hidden, 256)
        self.teacher = copy.deepcopy(nn.ModuleList([self.backbone, self.projector])).requires_grad_(False)

    def forward(self, views: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        head = nn.Sequential(self.projector, self.predictor)
        queries, tokens = zip(*(self.encode(self.backbone, head, view) for view in views))
        with torch.no_grad():
            keys = [self.encode(*self.teacher, view)[0] for view in views[:2]]
        losses = [contrast(q, k) for i, q in enumerate(queries) for j, k in enumerate(keys) if i != j]
        return 2 * torch.stack(losses).mean(), list(tokens)

    def update(self, step: int, steps: int) -> None:
        momentum = cosine(step, steps, self.options.momentum, 1.0)
        update_momentum(nn.ModuleList([self.backbone, self.projector]), self.teacher, momentum)


def contrast(queries: Tensor, keys: Tensor, temperature: float = 0.2) -> Tensor:
    queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    first = 0
    if torch.distributed.is_initialized():
        first = torch.distributed.get_rank() * len(keys)
        keys = concat_all_gather(keys)
    target = first + torch.arange(len(queries), device=queries.device)
    return 2 * temperature * F.cross_entropy(queries @ keys.T / temperature, target)


class BarlowTwins(Method):
    """Zbontar et al., 2021: the correlations of two views' embeddings come near the identity."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        hidden = self.options.hidden_dim
        self.head = BarlowTwinsProjectionHead(self.width, hidden, hidden)
        self.loss = BarlowTwinsLoss(gather_distributed=torch.distributed.is_initialized())

    def forward(self, views: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        z, tokens = zip(*(self.encode(self.backbone, self.head, view) for view in views))
        losses = [self.loss(z[i], z[j]) for i in range(len(z)) for j in range(min(i, 2))]
        return torch.stack(losses).mean(), list(tokens)


class VICReg(BarlowTwins):
    """Bardes, Ponce and LeCun, 2022: two views alike, each dimension alive, no two of them alike."""

    def __init__(self, *arguments, **options):
        Method.__init__(self, *arguments, **options)
        hidden = self.options.hidden_dim
        self.head = VICRegProjectionHead(self.width, hidden, hidden)
        # Its 25 : 25 : 1, on a scale where a regularizer of weight 1 counts; Adam does not mind.
        gather = torch.distributed.is_initialized()
        self.loss = VICRegLoss(lambda_param=1.0, mu_param=1.0, nu_param=0.04, gather_distributed=gather)


class DINO(Method):
    """Caron et al., 2021: each view predicts the centred and sharpened output of a teacher for another."""

    clip = 3.0

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.head, head = (self.projection() for _ in range(2))
        head.load_state_dict(self.head.state_dict())
        self.teacher = nn.ModuleList([copy.deepcopy(self.backbone), head]).requires_grad_(False)
        self.loss = DINOLoss(self.options.output_dim, teacher_temp=0.04)

    def projection(self) -> nn.Module:
        hidden, output = self.options.hidden_dim, self.options.output_dim
        return DINOProjectionHead(self.width, hidden, 256, output, freeze_last_layer=1)

    def forward(self, views: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        students, tokens = zip(*(self.encode(self.backbone, self.head, view) for view in views))
        with torch.no_grad():
            teachers = [self.encode(*self.teacher, view)[0] for view in views[:2]]
        return self.loss(teachers, list(students)), list(tokens)

    def before_step(self, epoch: int) -> None:
        self.head.cancel_last_layer_gradients(epoch)

    def update(self, step: int, steps: int) -> None:
        momentum = cosine(step, steps, self.options.momentum, 1.0)
        update_momentum(nn.ModuleList([self.backbone, self.head]), self.teacher, momentum)


class IBOT(DINO):
    """Zhou et al., 2022: DINO, and hidden patches predict what the teacher, who sees them, makes of them."""

    masks = True

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.patch_loss = IBOTPatchLoss(self.options.output_dim)

    def patch_heads(self) -> tuple[nn.Module, nn.Module]:
        """The student's and the teacher's, which are those of the class token."""
        return self.head, self.teacher[1]

    def spread(self, features: list[Tensor]) -> Tensor | float:
        """A loss on the class tokens besides."""
        return 0.0

    def forward(self, views: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        side = self.options.image_size // self.options.patch_size
        smallest = min(4, side**2 // 10)  # patches of a block; small maps have images with fewer hidden than 4
        shapes = [(len(view), side, side) for view in views]
        masks = [random_block_mask(shape, min_num_masks_per_block=smallest, device=views[0].device) for shape in shapes]
        student_head, teacher_head = self.patch_heads()
        features, tokens = zip(*(self.tokens(self.backbone, v, mask=m.flatten(1)) for v, m in zip(views, masks)))
        students = [self.embed(self.head, part) for part in features]
        hidden = [self.embed(student_head, part[m.flatten(1)]) for part, m in zip(tokens, masks)]
        with torch.no_grad():
            backbone, head = self.teacher
            seen, maps = zip(*(self.tokens(backbone, view) for view in views))
            teachers = [self.embed(head, part) for part in seen]
            shown = [self.embed(teacher_head, part[m.flatten(1)]) for part, m in zip(maps, masks)]
        patches = [self.patch_loss(t, s, m) for t, s, m in zip(shown, hidden, masks)]
        loss = self.loss(teachers, students) + torch.stack(patches).mean() + self.spread(list(features))
        return loss, list(tokens)


class DINOv2(IBOT):
    """Oquab et al., 2023: iBOT with a head of its own for the patches, and class tokens spread by KoLeo."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.patch_head, head = (self.projection() for _ in range(2))
        head.load_state_dict(self.patch_head.state_dict())
        self.patch_teacher = head.requires_grad_(False)
        self.koleo = KoLeoLoss()

    def patch_heads(self) -> tuple[nn.Module, nn.Module]:
        return self.patch_head, self.patch_teacher

    def spread(self, features: list[Tensor]) -> Tensor | float:
        return 0.1 * sum(self.koleo(self.invariant(part).float()) for part in features)

    def before_step(self, epoch: int) -> None:
        super().before_step(epoch)
        self.patch_head.cancel_last_layer_gradients(epoch)

    def update(self, step: int, steps: int) -> None:
        super().update(step, steps)
        update_momentum(self.patch_head, self.patch_teacher, cosine(step, steps, self.options.momentum, 1.0))


METHODS = {
    "mocov3": MoCoV3,
    "barlowtwins": BarlowTwins,
    "vicreg": VICReg,
    "dino": DINO,
    "ibot": IBOT,
    "dinov2": DINOv2,
}
