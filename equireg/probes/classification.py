"""k-nearest-neighbour and linear classifiers on frozen features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from equireg._checks import Arguments
from equireg.probes._features import standardized
from equireg.similarity import normalized

__all__ = ["knn_accuracy", "linear_probe"]


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    r"""Accuracy of a weighted k-nearest-neighbour classifier, as used for self-supervised features.

    The ``k`` training samples of highest cosine vote with weight :math:`e^{\cos / \tau}` (Wu et al., 2018; DINO).

    Args:
        train_features: [N, D], floating point; normalised here.
        train_labels: whole numbers [N], from 0.
        features: [M, D], of the samples to classify.
        labels: whole numbers [M], their classes.
        k: number of neighbours that vote, at most N.
        temperature: τ, above 0.

    Returns:
        The share of right answers, 0 to 1.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices, a negative label, no samples, features that are not
            finite, k above N.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> knn_accuracy(x, torch.tensor([0, 0, 1]), x, torch.tensor([0, 0, 0]), k=1)
        0.6666666666666666
    """
    check = Arguments("knn_accuracy")
    named = (("train_features", train_features), ("features", features))
    classes = _check_samples(check, train_features, train_labels, features, labels)
    check.count("k", k)
    if k > len(train_features):
        check.fail("k", f"at most the {len(train_features)} training samples", k)
    check.positive("temperature", temperature)
    bank, queries = (_directions(check, name, given) for name, given in named)
    votes_of = F.one_hot(train_labels.long(), classes).to(train_features.device)
    right = 0.0
    for rows, truth in zip(queries.split(1024), labels.split(1024)):
        with torch.autocast(rows.device.type, enabled=False):
            cosine, nearest = (rows @ bank.T).topk(k)
        # Relative to the nearest, so that no temperature overflows.
        weight = ((cosine - cosine[:, :1]) / temperature).exp()
        votes = (weight[..., None] * votes_of[nearest]).sum(1)
        right += (votes.argmax(1) == truth).float().sum().item()
    return right / len(features)


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    weight_decay: float = 1e-3,
    max_iterations: int = 200,
) -> float:
    r"""Accuracy of a linear classifier on frozen features: logistic regression.

    Features are standardised by the training samples, and :math:`\text{CE} + \tfrac{w}{2} \lVert W \rVert^2` is
    minimised by L-BFGS on all of them at once. The problem is convex, so the result depends on no learning rate and no
    seed. Without weight decay, convergence may take more iterations.

    Args:
        train_features: [N, D], floating point.
        train_labels: whole numbers [N], from 0.
        features: [M, D], of the samples to classify.
        labels: whole numbers [M], their classes.
        weight_decay: w, at least 0.
        max_iterations: of L-BFGS.

    Returns:
        The share of right answers, 0 to 1.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices, a negative label, no samples, features that are not
            finite.

    Example:
        >>> x, y = torch.randn(60, 5), torch.arange(60) % 3
        >>> x[:, 0] += 10 * y  # the classes lie apart
        >>> linear_probe(x, y, x, y)
        1.0
    """
    check = Arguments("linear_probe")
    classes = _check_samples(check, train_features, train_labels, features, labels)
    check.not_negative("weight_decay", weight_decay)
    check.count("max_iterations", max_iterations)
    check.finite("train_features", train_features)
    check.finite("features", features)
    x, x_test = standardized(train_features, features)

    # The line search needs full precision, even if the encoder ran under autocast.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        y = train_labels.long().clone()
        weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
        bias = torch.zeros(classes, device=x.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=max_iterations, line_search_fn="strong_wolfe")

        def objective() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(x, weight, bias), y) + weight_decay / 2 * weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(objective)  # type: ignore[arg-type]
        answers = F.linear(x_test, weight, bias).argmax(1)
    return float((answers == labels).float().mean())


def _check_samples(
    check: Arguments, train_features: Tensor, train_labels: Tensor, features: Tensor, labels: Tensor
) -> int:
    """Check the samples, and return the number of classes."""
    check.features("train_features", train_features, "N D")
    check.integers("train_labels", train_labels, "N")
    check.features("features", features, "M D")
    check.integers("labels", labels, "M")
    for name, given in (("train_features", train_features), ("features", features)):
        if given.numel() == 0:
            check.fail(name, "of at least one sample and one feature", list(given.shape))
    for name, given in (("train_labels", train_labels), ("labels", labels)):
        if int(given.min()) < 0:
            check.fail(name, "0 or above", int(given.min()))
    return int(max(train_labels.max(), labels.max())) + 1


def _directions(check: Arguments, name: str, features: Tensor) -> Tensor:
    """Rows of unit length, in fp32, whatever their scale."""
    check.finite(name, features)
    exact = features.detach().double()
    largest = exact.abs().amax(1, keepdim=True)
    return normalized((exact / torch.where(largest > 0, largest, 1)).float())
