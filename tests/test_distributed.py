"""Two processes of gloo on the CPU: what they agree on, and models under DistributedDataParallel."""

import pytest
import torch

from equireg import GridTransform, LateClassToken, SERLoss, TokenTap, _agreement
from equireg.distributed import Processes
from tests.processes import in_processes


def one_image_each(rank):
    """Alone it has no negatives; gathered it has. Rank 1 checks that a second call is as good as the first."""
    g = GridTransform.identity(1, (2, 2))
    torch.manual_seed(rank)
    tokens = torch.randn(2, 1, 4, 4)
    torch.manual_seed(0)
    ser = SERLoss(4, gather_distributed=True)
    return ser(*tokens, g, g).item(), ser(*tokens, g, g).item()


def gathered_dtypes(rank):
    processes = Processes("f", True)

    def agree(**options):
        with processes.alike() as facts:
            facts["x"] = torch.ones(2, **options)

    with pytest.raises(ValueError, match="f: x must be on cpu for the process group, got meta"):  # D11
        agree(device="meta")
    try:
        agree(dtype=torch.float64 if rank else torch.float32, requires_grad=not rank)
    except ValueError as error:
        return str(error)
    return "fine"


def trained(wrap, ranks):
    """Late class token and tap: the sums of all weights after two steps on the images of these ranks."""
    from torchvision.models import VisionTransformer, resnet18

    torch.manual_seed(0)
    sums = []
    vit = VisionTransformer(16, 4, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3)
    for plain, tapped in ((LateClassToken(vit, 2), None), (resnet18(num_classes=3), "layer2")):
        model = wrap(plain.eval())  # its batch norms take no statistics of a part of the images
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            generators = [torch.Generator().manual_seed(10 * rank + step) for rank in ranks]
            size = 16 if tapped is None else 64
            images = torch.cat([torch.rand(2, 3, size, size, generator=generator) for generator in generators])
            if tapped is None:
                logits, tokens = model(images, return_tokens=True)
            else:
                with TokenTap(model, tapped) as tap:
                    logits = model(images)
                tokens, logits = tap.tokens, 0 * logits  # so that all that is learned comes from the tokens
            optimizer.zero_grad()
            (logits.square().mean() + tokens.square().mean()).backward()
            optimizer.step()
        sums.append(sum(p.detach().double().abs().sum().item() for p in plain.parameters()))
    return sums


@pytest.mark.parametrize(
    ("served", "gathered"),
    [
        ("cpu:gloo,cuda:gloo", ["cpu"]),
        ("cuda:nccl", ["cuda"]),
        ("cpu:gloo,cuda:nccl", ["cpu", "cuda"]),
        ("xpu:xccl", ["xpu"]),
    ],
)
def test_where_a_process_group_gathers(monkeypatch, served, gathered):
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda group: served)
    assert _agreement._gathered(None) == gathered
    if "cpu" not in gathered:
        monkeypatch.setattr(torch.get_device_module(gathered[0]), "current_device", lambda: 1)
    expected = torch.device("cpu") if "cpu" in gathered else torch.device(gathered[0], 1)
    assert _agreement.backend_device() == expected


def test_a_checksum_follows_its_tensor():
    summed = _agreement.Checksum()
    for count in range(20):  # each where the last one may have lain
        assert summed.of(torch.full((1000,), count)) == _agreement.checksum(torch.full((1000,), count))
    numbers = torch.arange(9)
    before = summed.of(numbers)
    numbers[0] = 7
    assert summed.of(numbers) != before


def test_two_processes(tmp_path):
    """In one start of processes, as that takes longer than all the rest."""
    found = in_processes(2, several, tmp_path)
    alone, dtypes, sums = zip(*found)

    for first, second in alone:
        assert first == second
        assert first > 0
    assert (
        dtypes[0]
        == dtypes[1]
        == ("f: x must be alike in every process, got rank 0: [2] float32, rank 1: [2] float64 without gradient")
    )
    assert sums[0] == sums[1] == pytest.approx(trained(lambda model: model, ranks=(0, 1)), rel=1e-6)
    assert sums[0] != pytest.approx(trained(lambda model: model, ranks=(0,)), rel=1e-6)  # nor those of one half


def several(rank):
    sums = trained(torch.nn.parallel.DistributedDataParallel, ranks=(rank,))
    return one_image_each(rank), gathered_dtypes(rank), sums
