"""Several processes of gloo on the CPU, for a test."""

import datetime
import os
import time
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


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
    results = []
    while len(results) < world:
        if not queue.empty():
            results.append(queue.get())
        elif any(process.exitcode for process in processes):  # gloo may abort a process without a word
            raise AssertionError(f"processes ended with {[process.exitcode for process in processes]}")
        else:
            time.sleep(0.05)
    for _, problem, _ in results:
        assert problem is None, problem
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [value for _, _, value in sorted(results, key=lambda result: result[0])]


def _child(rank, world, path, queue, function, arguments):
    torch.set_num_threads(1)
    problem, value = None, None
    limit = datetime.timedelta(seconds=20)  # a collective that not all join fails, and does not hang
    store = dist.FileStore(path, world)
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
        value = function(rank, *arguments)
    except Exception:
        problem = traceback.format_exc()
    # Where one leaves while another still reads from it, or while threads of gloo run, gloo hangs or aborts.
    store.set(f"done {rank}", "")
    store.wait([f"done {other}" for other in range(world)], datetime.timedelta(seconds=60))
    queue.put((rank, problem, value))
    os._exit(0)
