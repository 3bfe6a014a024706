"""SIE on any layer: one half of the features stays, the other moves as the known transformation says.

The paper takes the backbone's output. Taking tokens of an intermediate layer is an addition here.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from equireg._checks import Arguments, for_layers
from equireg.baselines._hypernetwork import Hypernetwork
from equireg.baselines._pooled import pooled_pairs
from equireg.similarity import accumulation_dtype, gram

__all__ = ["SIELoss"]

_EPSILON = 1e-4  # VICReg's, below the root of a variance


class SIEParts(NamedTuple):
    """``SIELoss``, the sum of these with their weights; the predictor's variance has that of the variance."""

    loss: Tensor
    invariance: Tensor  # squared distance of the invariant embeddings
    equivariance: Tensor  # squared distance of the predicted equivariant embeddings from those of the view
    variance: Tensor  # how far standard deviations are below 1; of both halves and both sides
    covariance: Tensor  # squared covariances between components; likewise
    predictor_variance: Tensor  # how far standard deviations of the predicted embeddings are below 1


class SIELoss(nn.Module):
    r"""SIE: one half of the features is invariant, the other moves by a matrix that the transformation decides.

    Features are split along their width; each half has a head, whose embeddings of the image and of its view are
    :math:`z, z'` (invariant) and :math:`e, e'` (equivariant). A hypernetwork makes a matrix of the parameters
    :math:`g` of the transformation, :math:`W(g) = \sum_k g_k W_k`, and VICReg's terms keep all from collapsing
    (Garrido et al., "Self-Supervised Learning of Split Invariant Equivariant Representations", ICML 2023):

    .. math::
        \lambda_i \frac{1}{B} \sum_i \lVert z_i - z'_i \rVert^2
        + \lambda_e \frac{1}{B} \sum_i \lVert W(g_i)\, e_i - e'_i \rVert^2
        + \sum_{u \in \{z, z', e, e'\}} \bigl(\lambda_v V(u) + \lambda_c C(u)\bigr) + \lambda_v V(W(g)\, e)

    with :math:`V(u) = \frac{1}{d} \sum_j \max(0, 1 - \sqrt{\operatorname{Var}(u_j) + 10^{-4}})` and
    :math:`C(u) = \frac{1}{d} \sum_{j \ne k} \operatorname{Cov}(u)_{jk}^2`. Squared distances are divided by the width
    :math:`d`, so that the weights do not depend on it.

    The hypernetwork is linear and without bias, so it cannot ignore the transformation. It also makes 0 of parameters
    that are all 0: describe a transformation by numbers of which none vanish where it does nothing, as the cosine and
    sine of an angle, the classes of quarter turns as 0 and 1, or any parameters with a 1 beside them.

    Written from VICReg's terms and from what other papers report of SIE, not from the paper's full text or its code;
    check it against these before you publish a comparison. Choices made here: heads of two layers without BatchNorm,
    and weights to start from, to be chosen on validation images. Token maps are averaged over their places. Variances
    and covariances are those of the images of this process.

    Args:
        dim: D, the width of the features, at least 2; the first half, rounded down, is the invariant one.
        num_parameters: P, how many numbers describe a transformation.
        projection_dim: d, width of the embeddings of each half.
        invariance_weight: λ_i, at least 0, as all weights.
        equivariance_weight: λ_e.
        variance_weight: λ_v.
        covariance_weight: λ_c.

    Raises:
        TypeError, ValueError: a width that is no whole number above 0, a weight below 0.

    Example:
        >>> import torch
        >>> loss = SIELoss(dim=32, num_parameters=2)
        >>> features, transformed = torch.randn(2, 8, 16, 32)  # of images and their turned views, 16 tokens each
        >>> angle = 2 * torch.pi * torch.rand(8)
        >>> loss(features, transformed, torch.stack([angle.cos(), angle.sin()], 1)).shape
        torch.Size([])
    """

    def __init__(
        self,
        dim: int,
        num_parameters: int,
        *,
        projection_dim: int = 128,
        invariance_weight: float = 10.0,
        equivariance_weight: float = 4.5,
        variance_weight: float = 10.0,
        covariance_weight: float = 1.0,
    ):
        super().__init__()
        check = Arguments("SIELoss")
        check.count("dim", dim, least=2)
        check.count("num_parameters", num_parameters)
        check.count("projection_dim", projection_dim)
        weights = {"invariance": invariance_weight, "equivariance": equivariance_weight}
        weights |= {"variance": variance_weight, "covariance": covariance_weight}
        for name, weight in weights.items():
            check.not_negative(f"{name}_weight", weight)
        self.weights = (*weights.values(), variance_weight)  # of the terms, in the order of the parts
        self.halves, self.num_parameters = (dim // 2, dim - dim // 2), num_parameters
        # A bias of the last layer would move z and z' alike, which no term sees.
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Linear(half, projection_dim), nn.ReLU(), nn.Linear(projection_dim, projection_dim, bias=False)
            )
            for half in self.halves
        )
        self.hypernetwork = Hypernetwork(num_parameters, projection_dim)

    def forward(self, features: Tensor, transformed: Tensor, parameters: Tensor) -> Tensor:
        """The loss, a 0-d tensor.

        Args:
            features: of the images, [B, D] or tokens [B, T, D].
            transformed: of their transformed views, [B, D] or [B, T', D].
            parameters: what the transformations were, floating point [B, P], of order 1.

        Raises:
            TypeError, ValueError: wrong dtypes, shapes or devices, a batch of fewer than two images.
        """
        return self.parts(features, transformed, parameters).loss

    def parts(self, features: Tensor, transformed: Tensor, parameters: Tensor) -> SIEParts:
        """The loss and, detached, its terms before they are weighted."""
        check = Arguments("SIELoss").beside(self)
        check.sizes.update(D=sum(self.halves), P=self.num_parameters)
        before, after = pooled_pairs(check, features, transformed, parameters, "their variance is taken")
        before, after = (for_layers(self.heads, x) for x in (before, after))
        (z, z_after), (e, e_after) = (
            (head(half), head(half_after))
            for head, half, half_after in zip(self.heads, before.split(self.halves, 1), after.split(self.halves, 1))
        )
        predicted = self.hypernetwork(parameters, e)
        embeddings = [x.to(accumulation_dtype(x.dtype)) for x in (z, z_after, e, e_after, predicted)]
        z, z_after, e, e_after, predicted = embeddings
        invariance, equivariance = (z - z_after).square().mean(), (predicted - e_after).square().mean()
        variance, covariance = (sum(map(term, embeddings[:4]), z.new_zeros(())) for term in (_variance, _covariance))
        terms = invariance, equivariance, variance, covariance, _variance(predicted)
        loss = sum((weight * term for weight, term in zip(self.weights, terms)), z.new_zeros(()))
        return SIEParts(loss, *(term.detach() for term in terms))


def _variance(x: Tensor) -> Tensor:
    return (1 - (x.var(0) + _EPSILON).sqrt()).relu().mean()


def _covariance(x: Tensor) -> Tensor:
    covariance = gram((x - x.mean(0)).T.contiguous()) / (len(x) - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / len(covariance)
