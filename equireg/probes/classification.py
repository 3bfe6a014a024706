"""k-nearest-neighbour, linear and small non-linear classifiers on frozen features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from equireg._checks import Arguments
from equireg.probes._features import enough_for_epochs, seeded, standardized
from equireg.probes._linear import fit_linear, linear
from equireg.probes._mlp import fit_mlp, mlp
from equireg.similarity import exactly, normalized

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
    voters = train_labels.to(bank.device).long()
    right = 0.0
    for rows, truth in zip(queries.split(1024), labels.split(1024)):
        with torch.autocast(rows.device.type, enabled=False):
            cosine, nearest = (rows @ bank.T).topk(k)
        # Relative to the nearest, so that no temperature overflows.
        weight = ((cosine - cosine[:, :1]) / temperature).exp()
        votes = weight.new_zeros(len(rows), classes).scatter_add_(1, voters[nearest], weight)
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
    hidden_dim: int | None = None,
    epochs: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> float:
    r"""Accuracy of a linear classifier on frozen features: logistic regression.

    Features are standardised by the training samples, and :math:`\text{CE} + \tfrac{w}{2} \lVert W \rVert^2` is
    minimised by L-BFGS on all of them at once. The problem is convex, so the result depends on no learning rate and no
    seed. Without weight decay, convergence may take more iterations.

    With ``hidden_dim`` it is a non-linear probe, as in soft equivariance regularization, Table 3: an MLP of three
    layers with ReLU, fitted to the cross entropy by AdamW; the epoch that is best on a tenth of the samples is kept.

    Args:
        train_features: [N, D], floating point.
        train_labels: whole numbers [N], from 0.
        features: [M, D], of the samples to classify.
        labels: whole numbers [M], their classes.
        weight_decay: w, at least 0; of an MLP, that of AdamW.
        max_iterations: of L-BFGS.
        hidden_dim: width of the two hidden layers; None for the linear classifier.
        epochs: passes over the samples, of an MLP.
        seed: decides the initial weights of an MLP and the order of its samples; the global random state does not
            change.
        progress: whether an MLP shows a bar, where tqdm is installed.

    Returns:
        The share of right answers, 0 to 1.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices, a negative label, no samples, features that are not
            finite, fewer than 20 training samples for an MLP.

    Example:
        >>> x, y = torch.randn(60, 5), torch.arange(60) % 3
        >>> x[:, 0] += 10 * y  # the classes lie apart
        >>> linear_probe(x, y, x, y)
        1.0
        >>> sign = (x[:, 1] * x[:, 2] > 0).long()  # no line tells these classes
        >>> linear_probe(x, sign, x, sign) < linear_probe(x, sign, x, sign, hidden_dim=64, progress=False)
        True
    """
    check = Arguments("linear_probe")
    classes = _check_samples(check, train_features, train_labels, features, labels)
    check.not_negative("weight_decay", weight_decay)
    check.count("max_iterations", max_iterations)
    check.count("epochs", epochs)
    generator = seeded(check, seed)
    check.finite("train_features", train_features)
    check.finite("features", features)
    if hidden_dim is not None:
        check.count("hidden_dim", hidden_dim)
        enough_for_epochs(check, "train_features", len(train_features), len(train_features))
    x, x_test = standardized(train_features, features)
    if hidden_dim is None:
        weight, bias = logistic_regression(x, train_labels.long(), classes, weight_decay, max_iterations)
        return float((linear(x_test, weight, bias).argmax(1) == labels).float().mean())
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        rows, y = torch.randperm(len(x), generator=generator), train_labels.long().clone()
        layers = fit_mlp(
            x, y, rows, classes, F.cross_entropy, hidden_dim, epochs, weight_decay, generator, progress=progress
        )
        return float((mlp(x_test, layers).argmax(1) == labels).float().mean())


def logistic_regression(
    x: Tensor, targets: Tensor, classes: int, weight_decay: float, max_iterations: int
) -> tuple[Tensor, Tensor]:
    """Weight [C, D] and bias [C] of the least cross entropy with classes [N], or with weights of classes [N, C]."""
    with torch.inference_mode(False):
        y = targets.clone()  # for the gradient, which an inference tensor cannot serve
    bias = torch.zeros(classes, device=x.device)
    return fit_linear(x, lambda scores: F.cross_entropy(scores, y), bias, weight_decay, max_iterations)


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
    exact = exactly(features.detach())
    largest = exact.abs().amax(1, keepdim=True)
    return normalized((exact / torch.where(largest > 0, largest, 1)).float())
