"""A class token that enters a vision transformer late, so that its first blocks give a clean token map."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from equireg._checks import Arguments
from equireg.backbones._hookable import calling_thread, check_images, check_plain, is_torchvision_vit, prefix_tokens

__all__ = ["LateClassToken"]

_INSTEAD = "TokenTap reads the tokens of any layer without changing the model"


class LateClassToken(nn.Module):
    r"""A vision transformer whose class token enters after the first ``layer`` blocks, without a fork of its code.

    The first blocks see patch tokens alone, so their output is a clean token map (soft equivariance regularization,
    Section 3.1). Class, register and distillation tokens, with their positional embedding, bypass these blocks
    unchanged; block ``layer`` is the first to see them. The wrapper hooks the blocks of ``vit`` in place, so ``vit``
    itself also runs late. Both share the ``state_dict`` keys of ``vit``; ``torch.distributed.checkpoint``, which looks
    parameters up by their keys, takes ``vit``. With ``layer=0``, the output equals the unmodified model's bit for bit.

    Use it for training: in a pretrained model, a late class token changes the output strongly. Wrap first, then
    compile, then put DistributedDataParallel around this module, so that both results come from one call.

    Args:
        vit: a ViT of timm (ViT, DeiT, DINOv2, EVA, DINOv3 ...) or of torchvision, with a class token.
        layer: how many blocks run on patch tokens alone, 0 .. depth - 1. The paper takes 3 of 12.

    Raises:
        TypeError: ``vit`` is not a module, ``layer`` not a whole number.
        ValueError: an unsupported model (the message says why, and when ``TokenTap`` works instead), one that is
            compiled or wrapped already, a layer outside of the model.

    Example:
        >>> from torchvision.models import VisionTransformer
        >>> vit = VisionTransformer(32, 8, num_layers=4, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10)
        >>> model = LateClassToken(vit, layer=2)
        >>> logits, tokens = model(torch.rand(2, 3, 32, 32), return_tokens=True)
        >>> logits.shape, tokens.shape
        (torch.Size([2, 10]), torch.Size([2, 16, 16]))
    """

    vit: nn.Module
    layer: int
    num_prefix_tokens: int

    def __init__(self, vit: nn.Module, layer: int):
        super().__init__()
        check = Arguments("LateClassToken")
        check_plain(check, "vit", vit)
        check.count("layer", layer, least=0)
        blocks = _blocks(vit)
        _check_supported(check, vit, blocks)
        prefix = max(prefix_tokens(vit), 1)  # older releases of timm do not count the class token of CaiT or XCiT
        if layer >= len(blocks):
            check.fail("layer", f"in 0 .. {len(blocks) - 1} for {len(blocks)} blocks", layer)
        if any(isinstance(hook, (_Strip, _Keep)) for block in blocks for hook in block._forward_pre_hooks.values()):
            check.fail("vit", "a model that is not wrapped already", f"a wrapped {type(vit).__name__}")
        _check_first_block(check, vit, blocks[0], prefix)
        self.vit = vit
        self.layer, self.num_prefix_tokens = layer, prefix
        for block in blocks[:layer]:
            strip = _Strip(prefix)
            block.register_forward_pre_hook(strip)
            block.register_forward_hook(strip.restore, always_call=True)
            modules: Iterator[Any] = block.modules()
            for module in modules:
                if hasattr(module, "num_prefix_tokens"):  # attention with rotary embeddings leaves these unturned
                    module.num_prefix_tokens = 0
        self._keep = _Keep(prefix)
        blocks[layer].register_forward_pre_hook(self._keep)
        self.register_state_dict_post_hook(_drop_name)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_name)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, return_tokens: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The output of ``vit(x)``; with ``return_tokens`` also the patch tokens [B, T, D] after ``layer`` blocks.

        Raises:
            TypeError: a list of views.
            ValueError: images of another size than a model without dynamic sizes takes; reentrant activation
                checkpointing, which hides the tokens from autograd.
        """
        _check_size(self.vit, x)
        if not return_tokens:
            features: Tensor = self.vit(x)
            return features
        self._keep.ask()
        try:
            features = self.vit(x)
        finally:
            tokens = self._keep.give()
        if tokens is None:
            raise ValueError("LateClassToken: vit must run its blocks as modules, got a forward pass that did not")
        hidden = not torch.compiler.is_compiling() and features.requires_grad and tokens.grad_fn is None
        if hidden and torch.is_grad_enabled():
            early = _blocks(self.vit)[: self.layer]
            if any(parameter.requires_grad for block in early for parameter in block.parameters()):
                raise ValueError(
                    "LateClassToken: vit must checkpoint with use_reentrant=False, got tokens without gradient"
                )
        return features, tokens


class _Strip:
    """Removes the prefix tokens before a block, and puts them back after it."""

    def __init__(self, prefix: int):
        self.prefix = prefix
        self.held: dict[int, Tensor] = {}  # by thread; empty between the two hooks

    def __call__(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self.held[calling_thread()] = args[0][:, : self.prefix]
        return (args[0][:, self.prefix :], *args[1:])

    def restore(self, block: nn.Module, args: tuple[Any, ...], output: Tensor | None) -> Tensor | None:
        prefix = self.held.pop(calling_thread(), None)
        # No output after an error, or where checkpointing stops a block that has recomputed what it needs.
        return None if output is None or prefix is None else torch.cat([prefix, output], dim=1)


class _Keep:
    """Keeps the patch tokens that enter a block, while a forward pass asks for them."""

    def __init__(self, prefix: int):
        self.prefix = prefix
        self.kept: dict[int, Tensor | None] = {}

    def __call__(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        # A checkpointed block runs again in the backward pass, when they are no longer needed.
        if calling_thread() in self.kept:
            self.kept[calling_thread()] = args[0][:, self.prefix :]

    def ask(self) -> None:
        self.kept[calling_thread()] = None

    def give(self) -> Tensor | None:
        return self.kept.pop(calling_thread(), None)


def _check_size(vit: Any, x: Any) -> None:
    """Images that the model takes, said before its own assertion, which does not know the cure."""
    check = Arguments("LateClassToken")
    check_images(check, x)
    embed = getattr(vit, "patch_embed", None)
    size, cure = getattr(embed, "img_size", None), "create the model with dynamic_img_size=True"
    if is_torchvision_vit(vit):
        size, cure = (vit.image_size, vit.image_size), "torchvision's ViT has one size"
    elif not getattr(embed, "strict_img_size", False):
        size = None
    if size is not None and isinstance(x, Tensor) and tuple(x.shape[-2:]) != tuple(size):
        check.fail("images", f"[B, C, {size[0]}, {size[1]}] ({cure})", list(x.shape))


def _blocks(vit: Any) -> list[nn.Module]:
    """The transformer blocks in order; empty for an unknown kind of model."""
    blocks = vit.encoder.layers if is_torchvision_vit(vit) else getattr(vit, "blocks", None)
    return list(blocks) if isinstance(blocks, (nn.Sequential, nn.ModuleList)) else []


def _check_supported(check: Arguments, vit: Any, blocks: list[nn.Module]) -> None:
    name = type(vit).__name__
    class_token = getattr(vit, "class_token", None) if is_torchvision_vit(vit) else getattr(vit, "cls_token", None)
    if not blocks or not (is_torchvision_vit(vit) or hasattr(vit, "patch_embed")):
        check.fail("vit", "a ViT of timm or torchvision, with patches and blocks", f"{name}; {_INSTEAD}")
    if not isinstance(class_token, nn.Parameter):
        check.fail(
            "vit",
            "a ViT with a class token",
            f"{name} without one: there is nothing to insert, its blocks see no other"
            f" token than patches and registers; {_INSTEAD}",
        )
    # A learnt bias of position pairs has a row for the class token, which the first blocks would not fill.
    bias = [getattr(vit, attribute, None) for attribute in ("rel_pos_bias", "shared_rel_pos")]
    for module in blocks[0].modules():
        bias += [getattr(module, attribute, None) for attribute in ("relative_position_bias_table", "rel_pos")]
    if any(part is not None for part in bias):
        check.fail(
            "vit", "a ViT without relative position bias", f"{name}, whose bias counts the class token; {_INSTEAD}"
        )
    if not isinstance(getattr(vit, "patch_drop", None), (nn.Identity, type(None))):
        check.fail(
            "vit", "a ViT that keeps all its patches", f"{name} with patch_drop; create it with patch_drop_rate=0"
        )


class _Stop(Exception):
    pass


def _check_first_block(check: Arguments, vit: Any, block: nn.Module, prefix: int) -> None:
    """Check that block 0 gets the prefix, then every patch: stripping a missing prefix would silently drop patches."""
    seen: list[Any] = []

    def look(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.extend(args[:1])
        raise _Stop

    if is_torchvision_vit(vit):
        size, patches = (vit.image_size, vit.image_size), (vit.image_size // vit.patch_size) ** 2
    else:
        size, patches = (
            getattr(vit.patch_embed, "img_size", None) or (224, 224),
            getattr(vit.patch_embed, "num_patches", None),
        )
    parameter = next(vit.parameters())
    channels = next((m.in_channels for m in vit.modules() if isinstance(m, nn.Conv2d)), 3)
    image = torch.zeros(1, channels, *size, device=parameter.device, dtype=parameter.dtype)
    training = {module: module.training for module in vit.modules()}
    handle = block.register_forward_pre_hook(look)
    try:
        vit.eval()
        with torch.no_grad():
            vit(image)
    except _Stop:
        pass
    finally:
        handle.remove()
        for module, mode in training.items():
            module.training = mode
    shape = list(seen[0].shape) if seen and isinstance(seen[0], Tensor) else None
    if shape is None or len(shape) != 3 or patches is None or shape[:2] != [1, prefix + patches]:
        rule = f"a ViT whose first block sees [B, {prefix} + {patches}, D], class token first"
        check.fail("vit", rule, f"{type(vit).__name__}, which gives it {shape}; {_INSTEAD}")


def _drop_name(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Use the ViT's own keys, so that a checkpoint of either loads into the other."""
    for key in [key for key in state if key.startswith(f"{prefix}vit.")]:
        state[prefix + key.removeprefix(f"{prefix}vit.")] = state.pop(key)


def _add_name(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(prefix) and not key.startswith(f"{prefix}vit.")]:
        state[f"{prefix}vit.{key.removeprefix(prefix)}"] = state.pop(key)
