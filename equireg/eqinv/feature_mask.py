"""A learnable mask over features (EqInv, Wang et al., ECCV 2022, Step 3)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from equireg._checks import Arguments

__all__ = ["FeatureMask"]


class FeatureMask(nn.Module):
    r"""Selects features by a learnable vector: :math:`\sigma(m) \circ x`.

    EqInv (Wang et al., 2022), Section 4, Step 3. The vector starts uniform in [0, 1).

    Args:
        num_features: width D of the features.
        scale: None for the masked features as they are (the paper). A number gives ``scale · normalize(σ(m) ∘ x)``;
            the released code classifies with ``scale=10``.

    Example:
        >>> mask = FeatureMask(4)
        >>> mask(torch.ones(2, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(self, num_features: int, *, scale: float | None = None):
        super().__init__()
        check = Arguments("FeatureMask")
        check.count("num_features", num_features)
        if scale is not None:
            check.positive("scale", scale)
        self.weight = nn.Parameter(torch.rand(num_features))
        self.scale = scale

    def select(self, features: Tensor) -> Tensor:
        """The masked features, [..., D], without the scale."""
        return features * self.weight.sigmoid()

    def forward(self, features: Tensor) -> Tensor:
        check = Arguments("FeatureMask")
        check.device, check.device_of = self.weight.device, "the mask (irm.to(device) moves it)"
        check.floats("features", features)
        if features.shape[-1:] != self.weight.shape:
            check.fail("features", f"[..., {len(self.weight)}]", list(features.shape))
        selected = self.select(features)
        return selected if self.scale is None else self.scale * F.normalize(selected, dim=-1, eps=1e-6)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}" + ("" if self.scale is None else f", scale={self.scale}")

    @torch.no_grad()
    def fold_into(self, head: nn.Module) -> nn.Module:
        """``head ∘ mask`` as one module, with parameters of its own.

        Args:
            head: takes features [..., D].

        Returns:
            An ``nn.Linear`` where that is exact (a linear head, parametrised or not, without hooks, and no ``scale``);
            else an ``nn.Sequential`` of copies of the mask and the head.

        Raises:
            TypeError, ValueError: ``head`` is no module, or a linear one of another width.
        """
        check = Arguments("FeatureMask.fold_into")
        if not isinstance(head, nn.Module):
            check.fail_type("head", "an nn.Module", type(head).__name__)
        head = self._unmasked(head)
        # A subclass may do something else with its weight, and so may a hook; a parametrised layer does not.
        exact = self.scale is None and not head._forward_pre_hooks and not head._forward_hooks
        if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or not exact:
            return nn.Sequential(copy.deepcopy(self), head)
        if head.in_features != len(self.weight):
            check.fail("head", f"of {len(self.weight)} features", head.in_features)
        how = {"bias": head.bias is not None, "device": head.weight.device, "dtype": head.weight.dtype}
        # It draws no random numbers, so that folding once an epoch leaves the training as it is.
        folded: nn.Linear = skip_init(nn.Linear, head.in_features, head.out_features, **how)
        folded.weight.copy_(head.weight * self.weight.sigmoid())
        if head.bias is not None:
            folded.bias.copy_(head.bias)
        return folded

    def _unmasked(self, head: nn.Module) -> nn.Module:
        """A copy, without the hook by which ``EqInvTask`` puts this mask before its classifier."""
        own = {}
        for key, hook in head._forward_pre_hooks.items():
            owner = getattr(hook, "__self__", None)
            if getattr(getattr(owner, "irm", None), "mask", None) is self:
                own[key] = owner
        # What a hook made with a gradient, such as the weight of nn.utils.weight_norm, cannot be copied with it.
        made = [t for part in head.modules() for t in vars(part).values() if isinstance(t, Tensor) and t.grad_fn]
        # The hook's owner holds the whole model, which is not copied.
        shared = {id(t): t.detach().clone() for t in made} | {id(owner): owner for owner in own.values()}
        copied = copy.deepcopy(head, shared)
        for key in own:
            del copied._forward_pre_hooks[key]
        return copied
