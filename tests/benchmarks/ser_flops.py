"""What soft equivariance adds to the FLOPs of a MoCo-v3 step: ViT-S/16 at 224, 1% of a batch of 2,048.

Counted by PyTorch on the meta device: no number is computed, every product is counted, forward and backward.
"""

from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
from lightly.models.modules.heads import BYOLPredictionHead, MoCoProjectionHead
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from equireg import GridTransform, LateClassToken, SERLoss, split_batch
from tests.benchmarks.measure import Row, Settings

BATCH, RATIO, DRAWS = 2048, 0.01, 16


def mean_contrast_flops(x: Any, p: Any, keys: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    """With the gradients: three products with the positives of all, and with the rows themselves two."""
    assert keys is None
    return 5 * 2 * x[0] * x[0] * x[1]


Sizes = list[tuple[int, tuple[int, int], tuple[int, int]]]  # images and the grids of their views, of each sub-batch


def training_step(layer: int, with_loss: bool = True, depth: int = 12, device: str = "meta") -> Callable[[Sizes], None]:
    """Student forward and backward, momentum encoder forward; with a layer, SER's loss on the last of the sub-batches.

    Of images without content; on a GPU in bf16.
    """
    with torch.device(device):
        vit = timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True, depth=depth)
        vit = LateClassToken(vit, layer)
        projector = MoCoProjectionHead(384, 4096, 256, num_layers=3, batch_norm=True)
        predictor, ser = BYOLPredictionHead(256, 4096, 256), SERLoss(384)
    learning = nn.ModuleList([vit, projector, predictor, ser])

    def step(sizes: Sizes) -> None:
        learning.zero_grad()
        for images, *grids in sizes:
            views = [torch.zeros(images, 3, 16 * h, 16 * w, device=device) for h, w in grids]
            with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
                outputs = [vit(view, return_tokens=True) for view in views]
                with torch.no_grad():
                    keys = [projector(vit(view)) for view in views]
                queries = [predictor(projector(features)) for features, _ in outputs]
                losses = [nn.functional.cross_entropy(q @ k.T, torch.zeros(len(q), device=device).long())
                          for q, k in zip(queries, reversed(keys))]  # fmt: skip
                loss = losses[0] + losses[1]
                if layer and with_loss and (images, *grids) == sizes[-1]:
                    still = torch.zeros(images, dtype=torch.int64, device="cpu" if device == "meta" else device)
                    g1, g2 = (GridTransform(still, still.bool(), (14, 14), grid) for grid in grids)
                    loss = loss + ser(outputs[0][1], outputs[1][1], g1, g2)
            loss.backward()

    return step


def step_flops(layer: int, sizes: Sizes, with_loss: bool = True, depth: int = 12) -> int:
    step, formulas = training_step(layer, with_loss, depth), {torch.ops.equireg.mean_contrast: mean_contrast_flops}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step(sizes)
    return counter.get_total_flops()


def benchmark(settings: Settings) -> Iterator[Row]:
    draws, depth = (1, 4) if settings.quick else (DRAWS, 12)
    work = f"FLOPs of a step, ViT-S/16 at 224, batch {BATCH:,}, forward + backward, mean of {draws} draws of sizes"
    yield {"work": work, "version": "MoCo-v3", "flops": step_flops(0, [(BATCH, (14, 14), (14, 14))], depth=depth)}
    b1, b2 = (len(part) for part in split_batch(torch.zeros(BATCH), RATIO))
    draw, counts, without = torch.Generator().manual_seed(0), [], []
    for _ in tqdm(range(draws), unit="draw", leave=False, disable=None):
        grids = [GridTransform.random(1, (14, 14), generator=draw).target for _ in range(2)]
        sizes = [(b1, (14, 14), (14, 14)), (b2, *grids)]
        counts.append(step_flops(3, sizes, depth=depth))
        without.append(step_flops(3, sizes, with_loss=False, depth=depth))
    late = "the class token late, views of the group, no loss"
    yield {"work": work, "version": late, "flops": sum(without) / draws}
    yield {"work": work, "version": f"+ SER, r = {RATIO}", "flops": sum(counts) / draws}
