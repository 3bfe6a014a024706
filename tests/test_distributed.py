"""Several processes of gloo on the CPU: the loss and its gradients are those of one process with all images."""

import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from equireg import GridTransform, LateClassToken, SERLoss, TokenTap
from equireg.distributed import Processes

IMAGES = 2  # in each process


def in_processes(world, function, folder, *arguments):
    """What ``function(rank, *arguments)`` returns in each of ``world`` processes."""
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [
        context.Process(
            target=_child, args=(rank, world, str(folder / "store"), queue, function, arguments), daemon=True
        )
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    results = [queue.get() for _ in range(world)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for _, problem, _ in results:
        assert problem is None, problem
    return [value for _, _, value in sorted(results, key=lambda result: result[0])]


def _child(rank, world, store, queue, function, arguments):
    torch.set_num_threads(1)
    problem, value = None, None
    try:
        dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
        value = function(rank, *arguments)
        dist.barrier()  # a process that leaves while another still reads from it makes gloo abort there
        dist.destroy_process_group()
    except Exception:
        problem = traceback.format_exc()
    queue.put((rank, problem, value))


def whole_batch(world):
    """Tokens, elements and a module, the same wherever it is called."""
    generator = torch.Generator().manual_seed(1)
    g1, g2 = (GridTransform.random(world * IMAGES, (3, 3), generator=generator) for _ in range(2))
    tokens = [
        torch.randn(len(g), g.target[0] * g.target[1], 4, dtype=torch.float64, generator=generator) for g in (g1, g2)
    ]
    torch.manual_seed(2)
    return tokens, g1, g2, SERLoss(4, projection_dim=6, gather_distributed=True).double()


def part(g, rank):
    mine = slice(rank * IMAGES, (rank + 1) * IMAGES)
    return GridTransform(g.quarter_turns[mine], g.flip[mine], g.source, g.target)


def ser_in_a_process(rank, world):
    tokens, g1, g2, ser = whole_batch(world)
    encoder = torch.nn.Linear(4, 4).double()
    with torch.no_grad():
        encoder.weight.copy_(torch.eye(4))
        encoder.bias.zero_()
    mine = [t[rank * IMAGES : (rank + 1) * IMAGES].clone().requires_grad_() for t in tokens]
    model = torch.nn.parallel.DistributedDataParallel(Whole(encoder, ser))
    loss = model(*mine, part(g1, rank), part(g2, rank))
    loss.backward()
    return loss.item(), [t.grad.tolist() for t in mine], [p.grad.tolist() for p in model.module.parameters()]


class Whole(torch.nn.Module):
    def __init__(self, encoder, ser):
        super().__init__()
        self.encoder, self.ser = encoder, ser

    def forward(self, tokens1, tokens2, g1, g2):
        return self.ser(self.encoder(tokens1), self.encoder(tokens2), g1, g2)


@pytest.mark.parametrize("world", [2, 3])
def test_ser_equals_one_process_with_the_whole_batch(world, tmp_path):  # D4, D5
    tokens, g1, g2, ser = whole_batch(world)
    encoder = torch.nn.Linear(4, 4).double()
    with torch.no_grad():
        encoder.weight.copy_(torch.eye(4))
        encoder.bias.zero_()
    leaves = [t.clone().requires_grad_() for t in tokens]
    loss = Whole(encoder, ser)(*leaves, g1, g2)
    loss.backward()

    found = in_processes(world, ser_in_a_process, tmp_path, world)
    assert sum(value for value, _, _ in found) / world == pytest.approx(loss.item(), rel=1e-12)
    for i in range(2):
        # The mean over processes is DistributedDataParallel's, for parameters; tokens have none.
        theirs = torch.cat([torch.tensor(grads[i], dtype=torch.float64) for _, grads, _ in found]) / world
        torch.testing.assert_close(theirs, leaves[i].grad, rtol=1e-10, atol=1e-14)
    for _, _, grads in found:
        for mine, expected in zip(grads, [*encoder.parameters(), *ser.parameters()]):
            theirs = torch.tensor(mine, dtype=torch.float64)
            torch.testing.assert_close(theirs, expected.grad, rtol=1e-10, atol=1e-14)


def one_image_each(rank):
    """Alone it has no negatives; gathered it has. Rank 1 checks that a second call is as good as the first."""
    g = GridTransform.identity(1, (2, 2))
    torch.manual_seed(rank)
    tokens = torch.randn(2, 1, 4, 4)
    torch.manual_seed(0)
    ser = SERLoss(4, gather_distributed=True)
    return ser(*tokens, g, g).item(), ser(*tokens, g, g).item()


def misfits(rank):
    """What each process raises, for one misfit after the other; a hang would fail the test by its time limit."""
    ser, messages = SERLoss(4, gather_distributed=True), []
    grid = (3, 3) if rank else (2, 2)
    calls = [
        (GridTransform.identity(2 + rank, (2, 2)), torch.float32, 0),  # D1: uneven images
        (GridTransform.identity(2, grid), torch.float32, 0),  # D1: uneven places
        (GridTransform.identity(2, (2, 2)), torch.float32, rank),  # D3: a prefix token in one process only
        (GridTransform.identity(2, (2, 2)), torch.float32, 0),  # and afterwards all is well
    ]
    for g, dtype, prefix in calls:
        tokens = torch.randn(2, len(g), g.target[0] * g.target[1] + prefix, 4, dtype=dtype)
        try:
            messages.append(f"fine: {ser(*tokens, g, g).isfinite().item()}")
        except ValueError as error:
            messages.append(str(error))
    return messages


def gathered_dtypes(rank):
    processes = Processes("f", True)

    def agree(**options):
        return processes.agree("x", lambda: torch.ones(2, **options), gathered=lambda x: x)

    with pytest.raises(ValueError, match="f: x must be on cpu for the backend gloo, got meta"):  # D11
        agree(device="meta")
    try:
        agree(dtype=torch.float64 if rank else torch.float32, requires_grad=not rank)
    except ValueError as error:
        return str(error)
    return "fine"


def models_under_ddp(rank):
    """A late class token and a tap under DistributedDataParallel: two steps, and the same weights everywhere."""
    from torchvision.models import VisionTransformer, resnet18

    torch.manual_seed(0)
    sums = []
    vit = VisionTransformer(16, 4, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3)
    for model, tapped in ((LateClassToken(vit, 2), None), (resnet18(num_classes=3), "layer2")):
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        torch.manual_seed(10 + rank)
        for _ in range(2):
            images = torch.rand(2, 3, 16, 16) if tapped is None else torch.rand(2, 3, 64, 64)
            if tapped is None:
                logits, tokens = ddp(images, return_tokens=True)
            else:
                with TokenTap(ddp, tapped) as tap:
                    logits = ddp(images)
                tokens = tap.tokens
            optimizer.zero_grad()
            (logits.square().mean() + tokens.square().mean()).backward()
            optimizer.step()
        sums.append(sum(p.double().sum().item() for p in model.parameters()))
    return sums


def test_two_processes(tmp_path):
    """In one start of processes, as that takes longer than all the rest."""
    found = in_processes(2, several, tmp_path)
    alone, misfit, dtypes, sums = zip(*found)

    for first, second in alone:
        assert first == second
        assert first > 0
    for messages in misfit:
        assert "SERLoss: [B, T, D] must be alike in every process" in messages[0]
        assert "rank 0: [2, 4, 512] float32, rank 1: [3, 4, 512] float32" in messages[0]
        assert "rank 0: [2, 4, 512] float32, rank 1: [2, 9, 512] float32" in messages[1]
        assert messages[3] == "fine: True"
    assert "rank 1: refused, see the error there" in misfit[0][2]
    assert "tokens1 must be of 2 x 2 tokens, without class or register tokens" in misfit[1][2]
    assert (
        dtypes[0]
        == dtypes[1]
        == ("f: x must be alike in every process, got rank 0: [2] float32, rank 1: [2] float64 without gradient")
    )
    assert sums[0] == sums[1]


def several(rank):
    return one_image_each(rank), misfits(rank), gathered_dtypes(rank), models_under_ddp(rank)
