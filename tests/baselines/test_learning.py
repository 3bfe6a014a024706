"""Cases with an exact solution: what the losses ask for is learned, and is not where the features do not hold it."""

import math

import pytest
import torch
import torch.nn.functional as F

from equireg import CrossAttentionReconstruction, ESSLLoss, SIELoss, STLLoss


def turns_of_images(told):
    """Features that name the turn, or any turn."""
    turns = torch.arange(32) % 4
    return torch.eye(4)[turns if told else torch.randint(4, (32,))] + 0.1 * torch.randn(32, 4), turns


def pairs_in_aligned_rows(told):
    """An image, and what became of it: where the others of a row underwent the same, one pair tells of the other."""
    changes = torch.randperm(4)
    of_others = changes if told else torch.randperm(4)
    before, after = torch.eye(5)[:1].expand(4, 5), torch.eye(5)[1 + changes]
    images, others = F.normalize(torch.randn(2, 4, 5), dim=-1)
    pairs = (images, before), (images, after), (others, before), (others, torch.eye(5)[1 + of_others])
    return [torch.cat(parts, 1) for parts in pairs]


def points_turned(told):
    """Points of a plane beside what stays; the parameters are those of their rotation, or of another's."""
    points, stays, angle = torch.randn(32, 2), torch.randn(32, 2), 2 * math.pi * torch.rand(32)
    parameters = torch.stack([angle.cos(), angle.sin()], 1)
    turned = torch.view_as_real(torch.view_as_complex(points) * torch.view_as_complex(parameters))
    rows = torch.cat([stays, points], 1), torch.cat([stays, turned], 1)
    return *rows, parameters if told else parameters.roll(1, 0)


def patches_in_any_order(told):
    """The first view names its places; the second has the pixels beside the names, or those of another image."""
    names, images = 3 * torch.eye(4).expand(16, 4, 4), torch.randn(16, 1, 4, 4)
    patches = F.pixel_unshuffle(images, 2).flatten(2).mT
    order = torch.rand(16, 4).argsort(1)[..., None].expand(-1, -1, 8)
    second = torch.cat([names, patches], 2).gather(1, order)
    return torch.cat([names, 0 * patches], 2), second if told else second.roll(1, 0), images


CASES = {
    "E-SSL": (lambda: ESSLLoss(4, hidden_dim=16), turns_of_images, math.log(4)),
    "STL": (
        lambda: STLLoss(10, transformation_dim=8, projection_dim=16, temperature=0.05, transformation_weight=1.0),
        pairs_in_aligned_rows,
        math.log(4),  # which of four changes the other pair underwent
    ),
    "SIE": (lambda: SIELoss(4, 2, projection_dim=8, covariance_weight=0.0), points_turned, 4.5),
    "cross-attention": (
        lambda: CrossAttentionReconstruction(8, image_size=4, patch_size=2, num_heads=1, hidden_dim=32, channels=1),
        patches_in_any_order,
        1.0,  # the variance of the pixels
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_is_learned_where_the_features_tell(case):
    make, draw, untold = CASES[case]
    reached = {}
    for told in (True, False):
        torch.manual_seed(0)
        loss, values = make(), []
        optimizer = torch.optim.Adam(loss.parameters(), 0.01)
        for _ in range(250):
            value = loss(*draw(told))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.item())
        reached[told] = sum(values[-20:]) / 20
    assert reached[True] < 0.15 * untold
    assert reached[False] > 0.8 * untold


def test_stl_takes_the_transformation_from_the_other_pair():
    """A row's own view does not move its own features; the partner's does, in both directions."""
    torch.manual_seed(0)
    loss = STLLoss(6, transformation_weight=0.0)
    features, transformed, others, others_transformed = torch.randn(4, 5, 6)
    seen = []
    loss.hypernetwork.register_forward_pre_hook(lambda _, args: seen.append(args))
    loss(features, transformed, others, others_transformed)
    (conditions, starts), there, back = (
        seen[0],
        *loss.transformation(
            torch.stack([torch.cat([others, others_transformed], 1), torch.cat([others_transformed, others], 1)])
        ),
    )
    torch.testing.assert_close(starts[:10], torch.cat([features, transformed]))
    torch.testing.assert_close(conditions[:10], torch.cat([there, back]))


def test_sie_asks_nothing_of_a_plane_that_turns():
    """By the exact heads and the matrices of a rotation both distances vanish; the variance of what is empty stays."""
    loss = SIELoss(4, 2, projection_dim=4)
    identity, empty = torch.eye(2), torch.zeros(2, 2)
    with torch.no_grad():
        for first, _, last in loss.heads:
            first.weight.copy_(torch.cat([identity, -identity]))
            first.bias.zero_()
            last.weight.copy_(torch.cat([torch.cat([identity, -identity], 1), torch.zeros(2, 4)]))
        cosine, sine = torch.block_diag(identity, empty), torch.block_diag(torch.tensor([[0.0, -1], [1, 0]]), empty)
        loss.hypernetwork.matrices.weight.copy_(torch.cat([cosine, sine], 1))
    features, transformed, parameters = points_turned(told=True)
    parts = loss.parts(10 * features, 10 * transformed, parameters)
    assert parts.invariance == 0
    assert float(parts.equivariance) < 1e-8
    torch.testing.assert_close(parts.variance, torch.tensor(4 * 0.99 / 2))  # of two components of four, in each of four
    torch.testing.assert_close(parts.predictor_variance, torch.tensor(0.99 / 2))
    assert loss.parts(features, transformed, parameters.roll(1, 0)).equivariance > 0.1


def test_cross_attention_paints_from_the_second_view_alone():
    """Tokens of the second view that are all alike paint the same patch everywhere, whatever the first asks."""
    head = CrossAttentionReconstruction(8, image_size=(4, 6), patch_size=2)
    asked, alike = torch.randn(2, 6, 8), torch.randn(2, 1, 8).expand(2, 5, 8)
    patches = F.pixel_unshuffle(head.reconstruct(asked, alike), 2)
    torch.testing.assert_close(patches, patches[..., :1, :1].expand_as(patches))
    order = torch.randperm(5)
    second = torch.randn(2, 5, 8)
    torch.testing.assert_close(head.reconstruct(asked, second[:, order]), head.reconstruct(asked, second))
