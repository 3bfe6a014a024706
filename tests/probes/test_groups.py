import pytest
import torch

from equireg import group_accuracy


def test_it_equals_the_loop():
    predictions, labels, groups = torch.randint(3, (200,)), torch.randint(3, (200,)), torch.randint(4, (200,))
    groups[labels == 2] = 0  # groups 1 to 3 have no sample of class 2
    mean, worst, per_group = group_accuracy(predictions, labels, groups)
    found = []
    for g in range(4):
        for k in range(3):
            cell = [int(p == y) for p, y, c in zip(predictions, labels, groups) if int(c) == g and int(y) == k]
            found += [sum(cell) / len(cell)] if cell else []
            assert per_group[g, k].item() == pytest.approx(found[-1] if cell else torch.nan, nan_ok=True)
    assert worst == pytest.approx(min(found))
    assert mean == pytest.approx(sum(int(p == y) for p, y in zip(predictions, labels)) / 200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.rand(2), torch.arange(2), torch.arange(2)), "predictions must be a tensor of whole"),
        ((torch.arange(4), torch.arange(3), torch.arange(4)), r"labels must be \[N\] = \[4\], got \[3\]"),
        ((torch.arange(2), torch.arange(2), torch.tensor([0, -1])), "groups must be at least 0, got -1"),
        ((torch.arange(0),) * 3, "labels must be of at least one sample"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        group_accuracy(*arguments)
