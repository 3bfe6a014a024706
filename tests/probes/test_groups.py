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
            if cell:
                found.append(sum(cell) / len(cell))
                assert per_group[g, k].item() == pytest.approx(found[-1])
            else:
                assert per_group[g, k].isnan()
    assert worst == pytest.approx(min(found))
    assert mean == pytest.approx(sum(int(p == y) for p, y in zip(predictions, labels)) / 200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.rand(4, 3), torch.zeros(4).long(), torch.zeros(4).long()), "predictions must be a tensor of whole"),
        (
            (torch.zeros(4).long(), torch.zeros(3).long(), torch.zeros(4).long()),
            r"labels must be \[N\] = \[4\], got \[3\]",
        ),
        ((torch.zeros(2).long(), torch.zeros(2).long(), torch.tensor([0, -1])), "groups must be at least 0, got -1"),
        ((torch.zeros(0).long(),) * 3, "labels must be of at least one sample"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        group_accuracy(*arguments)
