"""What tests of hooks on backbones share."""

from concurrent.futures import ThreadPoolExecutor

import torch


def hooks(model):
    """How many there are."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def in_two_threads(work, inputs, times=20):
    """Whether ``work`` says of both inputs, again and again at the same time, that all is right."""

    @torch.no_grad()
    def again(given):
        return False not in {work(given) for _ in range(times)}

    with ThreadPoolExecutor(2) as threads:
        return all(threads.map(again, inputs))
