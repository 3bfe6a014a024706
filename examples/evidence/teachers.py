"""Base methods in which a vision transformer follows a teacher, the moving average of its own weights."""

import contextlib
import copy

import torch
import torch.nn.functional as F
from evidence.experiments import Settings
from evidence.networks import create
from evidence.turned import TurnedViews
from lightly.loss import DINOLoss
from lightly.models.modules import heads
from lightly.models.utils import update_momentum
from torch import Tensor, nn
from vipriors.backbone import class_tokens
from vipriors.images import NORMALIZE
from vipriors.training import cosine

import equireg

PROTOTYPES = 1024  # of DINO; its own, for ImageNet, are 65,536


class MoCoV3(nn.Module):
    """Chen, Xie and He, 2021, on a vision transformer."""

    def __init__(self, s: Settings, samples: int):
        super().__init__()
        self.s, self.network = s, create(s)
        width = self.network.embed_dim
        self.late = equireg.LateClassToken(self.network, s.get("enters", s["layer"]) if s["turned"] else 0)
        self.backbone = nn.Sequential(NORMALIZE, self.late)
        self.projection, self.prediction, teacher = self.make_heads(width)
        self.teacher = nn.ModuleList([copy.deepcopy(self.late), teacher]).requires_grad_(False)
        blocks = len(self.network.blocks)
        self.layers = range(blocks) if s.get("everywhere") else [s["layer"] - 1]  # whose maps turn
        self.turned = TurnedViews(s, width, s["patch_size"], len(self.layers))

    def make_heads(self, width: int) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Of the student, what it predicts the teacher's output by, and of the teacher, equal to the first."""
        hidden = self.s["hidden_dim"]
        projection = heads.MoCoProjectionHead(width, hidden, 256, num_layers=3, batch_norm=True)
        return projection, heads.BYOLPredictionHead(256, hidden, 256), copy.deepcopy(projection)

    def encode(self, parts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Class tokens of all parts of a view, and the maps of its last part."""
        with contextlib.ExitStack() as stack:
            taps = [stack.enter_context(equireg.TokenTap(self.network, f"blocks.{layer}")) for layer in self.layers]
            found = torch.cat([self.late(part) for part in parts])
            return found, [tap.tokens for tap in taps]

    def forward(self, pixels: Tensor, labels: Tensor, indices: Tensor, progress: float) -> tuple[Tensor, dict]:
        pairs = self.turned(pixels / 255)
        found = [[self.encode(parts) for parts in pair.views] for pair in pairs]
        # One base loss over both parts of the batch; queries are of all views, keys of the two global ones.
        queries = [self.prediction(self.projection(features)) for pair in found for features, _ in pair]
        momentum = cosine(round(1e6 * progress), 10**6, self.s["momentum"], 1.0)
        for student, teacher in zip((self.late, self.projection), self.teacher):
            update_momentum(student, teacher, momentum)
        with torch.no_grad():
            backbone, projection = self.teacher
            keys = [projection(torch.cat([backbone(part) for part in parts])) for parts in pairs[0].views]
        loss = self.compared(queries, keys)
        maps = [[of_view for _, of_view in pair] for pair in found]
        return loss + sum(map(self.turned.regularizer, maps, [pair.elements for pair in pairs])) / len(pairs), {}

    def compared(self, queries: list[Tensor], keys: list[Tensor]) -> Tensor:
        """Each query with the keys of other views; views i of both are the same."""
        pairs = [(q, k) for i, q in enumerate(queries) for j, k in enumerate(keys) if i != j]
        return 2 * sum(contrast(q, k) for q, k in pairs) / len(pairs)

    def probed(self, images: Tensor) -> Tensor:
        """What linear probes read."""
        return class_tokens(self.network, self.late.layer, NORMALIZE(images))


class DINO(MoCoV3):
    """Caron et al., 2021: the same student, teacher and views, and another head and loss."""

    def __init__(self, s: Settings, samples: int):
        super().__init__(s, samples)
        self.loss = DINOLoss(PROTOTYPES)

    def make_heads(self, width: int) -> tuple[nn.Module, nn.Module, nn.Module]:
        student, teacher = (
            heads.DINOProjectionHead(width, self.s["hidden_dim"], output_dim=PROTOTYPES) for _ in range(2)
        )
        teacher.load_state_dict(student.state_dict())  # its weight norm cannot be copied
        return student, nn.Identity(), teacher

    def compared(self, queries: list[Tensor], keys: list[Tensor]) -> Tensor:
        return self.loss([key.float() for key in keys], [query.float() for query in queries])


def contrast(queries: Tensor, keys: Tensor, temperature: float = 0.2) -> Tensor:
    logits = F.normalize(queries.float(), dim=1) @ F.normalize(keys.float(), dim=1).T / temperature
    return 2 * temperature * F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))
