"""The network of all steps: a timm ResNet or vision transformer, for images of the recipe's size."""

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from equireg import ImageFiles, LateClassToken, WithIndex, extract_features, predict_tta
from vipriors.images import whole
from vipriors.run_folder import finished, load, made_with
from vipriors.training import TrainingError, differences

SAME = ("model", "patch_size", "late_class_token")  # of Step 1 and of the steps that take its encoder
if not torch.cuda.is_available():  # at these sizes its backward pass takes as long as all the rest of a step
    timm.layers.set_fused_attn(False)


def is_vit(model: str) -> bool:
    """By its name in timm, which must have it."""
    if not timm.is_model(model):
        raise ValueError(f"--model must be the name of a model in timm, got {model!r}")
    return timm.model_entrypoint(model).__module__.endswith(("vision_transformer", "deit"))


def encoder_of(options: Namespace) -> Path | None:
    """``--encoder``, or the one that Step 1 left; None where there is neither."""
    return options.encoder or finished(options.out / "pretrain" / "encoder.pt")


def create(options: Namespace, encoder: Path | None = None, num_classes: int = 0) -> nn.Module:
    """The model, with the weights of an encoder where one is given, and an output for each class."""
    sizes: dict[str, Any] = {}
    if is_vit(options.model):
        sizes = {"img_size": options.image_size, "patch_size": options.patch_size, "dynamic_img_size": True}
        sizes["drop_path_rate"] = getattr(options, "drop_path", 0.0)  # in fine-tuning
    model = timm.create_model(options.model, num_classes=0, **sizes)
    if options.late_class_token:
        LateClassToken(model, options.late_class_token)
    if encoder is not None:
        # Another patch size changes what the weights mean, and another place of the class token no shape tells.
        old = {name: made_with(encoder.parent, name) for name in SAME}
        if old["model"] and (changed := differences(old, {name: getattr(options, name) for name in SAME})):
            raise TrainingError(f"{encoder} was made with other settings: {changed}")
        try:
            model.load_state_dict(load(encoder))
        except RuntimeError as error:
            wrong = str(error).strip().splitlines()[-1].strip()
            size = f"--image-size {options.image_size} --patch-size {options.patch_size}"
            raise TrainingError(
                f"{encoder} is of another model than --model {options.model} {size}: {wrong}"
            ) from error
    if num_classes:
        model.reset_classifier(num_classes)
    return model.to(memory_format=torch.channels_last)


def class_tokens(vit: nn.Module, late: int, images: Tensor) -> Tensor:
    """The class tokens of the last four blocks that have it, the last one last: what linear probes read (SER, 4.1)."""
    count = min(4, len(vit.blocks) - late)
    found = vit.forward_intermediates(images, count, return_prefix_tokens=True, norm=True, intermediates_only=True)
    return torch.cat([prefix[:, 0] for _, prefix in found], 1)


def frozen_features(
    model: nn.Module, images: ImageFiles, options: Namespace, crops: str = "", probed: bool = False
) -> tuple[Tensor, Tensor]:
    """Features [N, D] (a classifier's: logits) and labels [N]; with ``crops``, probabilities merged over these.

    ``probed``: of a vision transformer the ``class_tokens``, of which the last is its own output.
    """
    images = images.take(range(len(images)))
    images.transform = whole(options)
    loader = DataLoader(WithIndex(images), batch_size=256, num_workers=options.workers)
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    model.to(accelerator.device)
    with accelerator.autocast():
        encoder = partial(predict_tta, model, crops=crops, merge="gmean") if crops else model
        if probed and is_vit(options.model):
            encoder = partial(class_tokens, model, options.late_class_token)
        features, labels, _ = extract_features(encoder, loader, progress=False)
    return features.float(), labels


def accuracy(scores: Tensor, labels: Tensor) -> float | None:
    """In percent, of scores [N, C]; None without labels, as the challenge's test images are."""
    return 100 * float((scores.argmax(1) == labels).float().mean()) if (labels >= 0).all() else None
