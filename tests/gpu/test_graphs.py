"""Steps captured as a CUDA graph and replayed with other inputs. On a CPU the same steps run without a capture."""

import torch
from torch import nn

from tests.gpu.devices import every_device
from tests.gpu.work import every_work, example, on
from tests.records.record import leaves
from tests.records.running import near, objective, step


def captured(function, device):
    """The function as a graph; its results lie where those of the last call before the replay lay."""
    if device == "cpu":
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles kernels and takes workspaces, which a capture cannot
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph, results = torch.cuda.CUDAGraph(), None
    with torch.cuda.graph(graph):
        results = function()

    def replay():
        graph.replay()
        return results

    return replay


def dtype_of(name):
    return torch.float16 if "triton" in name else torch.float32


def other(args):
    """New features in the places of the old."""
    with torch.no_grad():
        for part in leaves(args):
            part.copy_(torch.rand_like(part))


@every_device
@every_work
def test_forward_and_backward(name, device):
    loss, args = example(name, device, dtype_of(name))
    replay = captured(lambda: step(loss, args), device)
    for _ in range(2):
        other(args)
        found, expected = replay(), step(*on((loss, args), device, dtype_of(name)))
        for mine, theirs in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
            assert near(mine, theirs.double(), 1e-5)


@every_device
@every_work
def test_a_training_step(name, device):
    """Encoder, loss, gradients and optimizer in one graph: after three replays the parameters are those of a loop."""
    loss, args = example(name, device, dtype_of(name))
    width = args[0].shape[-1]
    encoder = nn.Linear(width, width).to(device, dtype_of(name))
    learning = [*encoder.parameters(), *(loss.parameters() if isinstance(loss, nn.Module) else ())]
    optimizer = torch.optim.SGD(learning, lr=0.1)
    start = [parameter.detach().clone() for parameter in learning]
    given = [part.detach() if isinstance(part, torch.Tensor) else part for part in args]

    def train():
        optimizer.zero_grad(set_to_none=True)
        total = objective(loss(encoder(given[0]), *given[1:]))
        (total / total.detach().abs()).backward()
        optimizer.step()

    def after(run):
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter, value in zip(learning, start):
                parameter.copy_(value)
        for _ in range(3):
            other(args)
            run()
        return [parameter.detach().clone() for parameter in learning]

    replayed, looped = after(captured(train, device)), after(train)
    for mine, theirs, before in zip(replayed, looped, start, strict=True):
        assert near(mine, theirs.double(), 1e-5)
        assert theirs.isfinite().all()
        assert not torch.equal(theirs, before)
