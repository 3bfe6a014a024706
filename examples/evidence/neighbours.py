"""Other ways to a classifier that does not lean on contexts nobody labelled, each in a few lines of its formula."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def jtt_weights(logits: Tensor, labels: Tensor, factor: float) -> Tensor:
    """Just train twice (Liu et al., ICML 2021): what a briefly trained network gets wrong counts λ times.

    w(n) = λ where argmax f(x_n) ≠ y_n, else 1; over the mean of all, so that the size of the loss stays.
    """
    weights = 1 + (factor - 1) * (logits.argmax(1) != labels).float()
    return weights / weights.mean()


def eiil_environments(logits: Tensor, labels: Tensor, steps: int = 500, lr: float = 0.05) -> Tensor:
    """Environment inference for invariant learning (Creager, Jacobsen and Zemel, ICML 2021): 0 or 1 for each sample.

    The soft assignment q in (0, 1)^N at which a reference network f is the least invariant,

        q* = argmax_q  Σ_e ‖∂/∂w R_e(w)‖² at w = 1,    R_e(w) = mean over n of q_e(n) ℓ(w f(x_n), y_n),   q_0 = 1 − q_1

    by Adam on the logits of q; then q* > 1/2. The derivative of a sample's cross entropy in w is Σ_c (p_c − y_c) f_c.
    """
    slope = ((logits.softmax(1) - F.one_hot(labels, logits.shape[1])) * logits).sum(1)
    q = torch.randn(len(labels)).requires_grad_()
    optimizer = torch.optim.Adam([q], lr=lr)
    for _ in range(steps):
        penalty = (q.sigmoid() * slope).mean().square() + ((1 - q.sigmoid()) * slope).mean().square()
        optimizer.zero_grad()
        (-penalty).backward()
        optimizer.step()
    return (q.detach() > 0).long()


class GroupDRO(nn.Module):
    """Distributionally robust over groups (Sagawa et al., ICLR 2020), the online algorithm.

    With the mean loss ℓ_g of each group in the batch, q_g ← q_g exp(η ℓ_g) / Σ_h q_h exp(η ℓ_h), and then the loss is
    Σ_g q_g ℓ_g. A group that is not in the batch has the loss 0. ``groups`` [N] are 0 .. G - 1.
    """

    def __init__(self, groups: Tensor, step: float):
        super().__init__()
        count = int(groups.max()) + 1
        self.step = step
        self.register_buffer("groups", groups)
        self.register_buffer("q", torch.full((count,), 1 / count))

    def forward(self, losses: Tensor, indices: Tensor) -> Tensor:
        of_group = F.one_hot(self.groups[indices], len(self.q)).to(losses.dtype)
        means = losses @ of_group / of_group.sum(0).clamp(min=1)
        self.q = (self.q.log() + self.step * means.detach()).softmax(0)
        return self.q @ means


def afr_weights(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Automatic feature reweighting (Qiu et al., ICML 2023): of images that the network f was not trained on.

    w(n) ∝ exp(−γ p_n) / (images of class y_n), with the probability p_n that f gives to the right class; 1 in the mean.
    """
    weights = (-gamma * logits.softmax(1).gather(1, labels[:, None]).squeeze(1)).exp()
    weights /= labels.bincount()[labels]
    return weights / weights.mean()


class Anchor(nn.Module):
    """AFR's second part: the last layer is trained anew from θ̂, that of f, by its weights, + λ ‖θ − θ̂‖²."""

    def __init__(self, head: nn.Module, strength: float):
        super().__init__()
        self.strength = strength
        self.register_buffer("first", nn.utils.parameters_to_vector(head.parameters()).detach())

    def forward(self, head: nn.Module) -> Tensor:
        return self.strength * (nn.utils.parameters_to_vector(head.parameters()) - self.first).square().sum()
