"""Small trainings, each in a process of its own: to kill them, or to fill their disk."""

import argparse
import errno
import importlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from torch import nn

from tests.faults import Faults

EXAMPLES = Path(__file__).parent.parent / "examples"
STEPS = 24  # 6 epochs of 4 batches


def only_loopback():
    """Sockets reach this machine alone."""

    class Loopback(socket.socket):
        def connect(self, address):
            if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
                raise AssertionError(f"a connection to {address}")
            return super().connect(address)

        connect_ex = connect

    lookup = socket.getaddrinfo

    def local_lookup(host, *arguments, **options):
        if host not in (None, "127.0.0.1", "::1", "localhost", socket.gethostname()):
            raise AssertionError(f"a look-up of {host}")
        return lookup(host, *arguments, **options)

    socket.socket, socket.getaddrinfo = Loopback, local_lookup


if os.environ.get("EQUIREG_TRAINERS"):  # in the process that the others are forked from
    sys.path.insert(0, str(EXAMPLES))
    only_loopback()
    torch.set_num_threads(1)
    for name in ("training", "ssl_methods", "ser_pretrain", "reconstruction_pretrain", "ipirm_pretrain", "distill"):
        importlib.import_module(name)


def start(job, *arguments, output, **options):
    """A process that does ``job`` of this module; what it says goes into the file ``output``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trainers"])
    if multiprocessing.forkserver._forkserver._forkserver_pid is None:
        root = str(EXAMPLES.parent)
        extra = {"EQUIREG_TRAINERS": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "CUDA_VISIBLE_DEVICES": ""}
        extra["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        before = dict(os.environ)
        os.environ.update(extra)
        try:
            multiprocessing.forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)
    process = context.Process(target=_child, args=(job, str(output), arguments, options))
    process.start()
    return process


def run(job, *arguments, output, **options):
    """Exit code and words of a process that does ``job``."""
    process = start(job, *arguments, output=output, **options)
    process.join(120)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"{job} hangs: {Path(output).read_text()}")
    return process.exitcode, Path(output).read_text(errors="surrogateescape")


def _child(job, output, arguments, options):
    words = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(words, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method("fork", force=True)  # of those that load images
    from training import surviving

    surviving.as_program(lambda: globals()[job](*arguments, **options))


# --------------------------------------------------------------------------------------------------- a small training


def make_images(folder, classes=("cat", "dog", "eel", "fox"), count=8, size=(8, 8)):
    """Noise, in the folders train and test."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for part in ("train", "test"):
        for name in classes:
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (*size, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / part / name / f"{i}.png")
    return folder


def options_of(data, out, **changes):
    """What ``parse`` gives."""
    chosen = {"data": Path(data), "out": Path(out), "resume": False, "method": "small", "seed": 3, "images": 32}
    chosen |= {"batch_size": 8, "epochs": 6, "warmup_epochs": 1, "lr": 1e-2, "weight_decay": 0.05, "amp": "none"}
    chosen |= {"workers": 0, "save_every": 3, "max_skipped": 10, "worker_timeout": 60, "allow_data_change": False}
    chosen |= {"broken": "raise", "max_bad": 0.01}
    return argparse.Namespace(**{**chosen, "evaluate_on": "test", "image_size": 8, **changes})


class Small(nn.Module):
    """All that a checkpoint must hold: buffers, dropout, a teacher that follows, random numbers of both kinds."""

    clip = 1.0

    def __init__(self):
        super().__init__()
        self.student = nn.Sequential(
            nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 8)
        )
        self.teacher = nn.Linear(192, 8).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()))

    @property
    def method(self):
        return self

    def forward(self, images):
        self.seen += images.sum()
        loss = (self.student(images) - self.teacher(images.flatten(1))).square().mean() * (1 + random.random())  # noqa: S311
        return loss, {"part": loss.detach()}

    def before_step(self, epoch):
        pass

    @torch.no_grad()
    def update(self, step, steps):
        self.teacher.bias.lerp_(self.student[-1].bias, 0.01)


class Noisy:
    """Images of 8 pixels with noise."""

    def __init__(self, options, rank):
        self.options, self.rank = options, rank

    def __call__(self, samples):
        import training

        with torch.random.fork_rng(devices=[]):
            training.seed_everything(self.options.seed, samples[0][0], self.rank)
            plain = training.plain_transform(self.options)
            return (torch.stack([plain(sample[1]) + 0.1 * torch.randn(3, 8, 8) for sample in samples]),)


class PoisonedLoss(Small):
    """In steps 5 and 6 the images are NaN."""

    def forward(self, images):
        step = self.calls = getattr(self, "calls", 0) + 1
        return super().forward(images * float("nan") if step in (5, 6) else images)


class PoisonedGradient(PoisonedLoss):
    """In steps 5 and 6 the gradient of a finite loss is infinite."""

    def forward(self, images):
        loss, parts = Small.forward(self, images)
        step = self.calls = getattr(self, "calls", 0) + 1
        if step in (5, 6):
            weight = self.student[-1].weight
            loss = loss + (weight - weight.detach()).abs().sum().sqrt()
        return loss, parts


class Unreadable(Noisy):
    def __call__(self, samples):
        raise ValueError("images/cat\x1b[2J.png cannot be read")


class Slow(Noisy):
    """Step 5 takes minutes."""

    def __call__(self, samples):
        if samples[0][0] == 4:
            time.sleep(600)
        return super().__call__(samples)


class Killed(Noisy):
    """The process is killed in step 5, as where memory ends."""

    def __call__(self, samples):
        if samples[0][0] == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(samples)


def small_training(
    data, out, *, objective=Small, collate=Noisy, fault=None, breaks=None, group=False, shown=False, **changes
):
    """``fault`` is (what, when, label, which time); see ``Faults``. ``group``: of processes of its own."""
    import training

    torch.set_num_threads(1)
    options, folder = options_of(data, out, **changes), Path(out) / "small"
    if group:
        os.setpgid(0, 0)
    if shown:
        sys.argv.append("--traceback")
    if fault is not None:
        Faults(folder, *fault)
    if breaks == "reader":  # of a pipe
        reading, writing = os.pipe()
        os.close(reading)
        for stream in (1, 2):
            os.dup2(writing, stream)
    elif breaks == "terminal":
        sys.stdout = sys.stderr = None
    elif breaks == "log":
        before = training.loop.StepBatches.__init__

        def then_break(self, *arguments, **options):  # after the log is there, and before its first line
            before(self, *arguments, **options)
            (folder / "log.jsonl").unlink()
            (folder / "log.jsonl").symlink_to("/dev/full")

        training.loop.StepBatches.__init__ = then_break

    def measure(trained, device):
        return {"sum": sum(float(value.double().sum()) for value in trained.state_dict().values())}

    training.run_training(options, {}, folder, "", objective, lambda rank: collate(options, rank), measure)


def limited(data, out, size):
    """Where no file may have more bytes than that."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    small_training(data, out)


def two_processes(data, out, rank, port, **changes):
    """One of two."""
    addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", **addresses})
    small_training(data, out, **changes)


def options(data, out, arguments, forbidden=False):
    """Those of an example."""
    import ipirm_pretrain
    import training

    if forbidden:
        Path.iterdir = refuse
    sys.argv = ["ipirm_pretrain.py", *arguments]
    training.parse("What it does.", ipirm_pretrain.RECIPES, ipirm_pretrain.add_options)


def refuse(path):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def say_names(data, out):
    from training.run_folder import say

    say("caf\udce9")
    print("a\nb".replace("\n", " "))


def connect(data, out):
    socket.socket().connect(("192.0.2.1", 80))


TINY = {"depth": 0, "image_size": 16, "patch_size": 4, "local_size": 8, "images": 16, "batch_size": 8, "epochs": 4}
TINY |= {"warmup_epochs": 1, "hidden_dim": 32, "output_dim": 64, "layer": 2, "probe_images": 32, "amp": "none"}
TINY |= {"update_every": 1, "queue_size": 16, "r2_images": 36, "stage1_epochs": 1}


def options_of_example(name, data, out, **changes):
    module = importlib.import_module(name)
    import training

    known = next(iter(module.RECIPES.values())).keys() | {"probe_images", "amp", "r2_images", "stage1_epochs"}
    model = "test_resnet" if name in ("ipirm_pretrain", "distill") else "test_vit"
    chosen = {"model": model, **{key: value for key, value in TINY.items() if key in known}, **changes}
    chosen = {key: value for key, value in chosen.items() if name == "reconstruction_pretrain" or key != "r2_images"}
    chosen = {key: value for key, value in chosen.items() if name == "distill" or key != "stage1_epochs"}
    if model == "test_resnet":
        chosen["image_size"] = 32
    flags = [part for key, value in chosen.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    sys.argv = [f"{name}.py", "--data", str(data), "--out", str(out), *flags]
    return module, training.parse("", module.RECIPES, module.add_options)


def example(data, out, name):
    """All of it."""
    module, _ = options_of_example(name, data, out, ser="on")
    module.main()


# ------------------------------------------------------------------------------------------------- what lasts in it


class Unregistered(Small):
    def __init__(self):
        super().__init__()
        self.count, self.average, self.generator = 0, torch.zeros(1), torch.Generator()

    def forward(self, images):
        self.count += 1
        self.average = self.average + torch.rand(1, generator=self.generator)
        return super().forward(images)


def walk(data, out, example, method):
    """Print what changes in steps and is not in the ``state_dict``."""
    import training

    torch.set_num_threads(1)
    if example == "unregistered":
        options = options_of(data, out)
        objective, collate = Unregistered(), Noisy(options, 0)
    elif example.startswith("vipriors "):
        options, objective, collate = of_recipe(example.split()[1], data, out, method)
    else:
        chosen = {} if example == "distill" else {"method": method}
        module, options = options_of_example(example, data, out, **chosen)
        if example == "distill":
            teacher = module.classifier(options, None).eval().requires_grad_(False)
            objective, collate = module.student(options, method, None, teacher), module.Augmented(options, 0)
        elif example == "ipirm_pretrain":
            objective, collate = module.Objective(options, True), module.TwoViews(options, 0)
        elif example == "reconstruction_pretrain":
            objective, collate = module.Objective(options, 2), module.Crops(options, 0)
        else:
            objective, collate = module.Objective(options, True), module.Views(options, True, 0)
    images, optimizer = training.training_images(options), training.adamw(objective, options)
    found = []
    for step in range(4):
        loss, _ = objective(*collate([(step, *images[i], i) for i in range(8)]))
        optimizer.zero_grad()
        loss.backward()
        objective.method.before_step(step)
        optimizer.step()
        objective.method.update(step, 8)
        saved = {value.untyped_storage().data_ptr() for value in objective.state_dict().values() if is_tensor(value)}
        found.append(dict(leaves(objective, "", saved, set())))
    first, last = found[1], found[-1]
    print(json.dumps(sorted(name for name in first.keys() | last.keys() if first.get(name) != last.get(name))))


def of_recipe(step, data, out, method):
    """A step's objective, with all that it can have: SER and reconstruction, or environments."""
    sys.path.insert(0, str(EXAMPLES))
    from vipriors import images, presets

    from equireg import Environments

    module = importlib.import_module(f"vipriors.{step}")
    values = {**presets.values("tiny10", step, method=method), "shots": 0, "layout": "folders", "draw": -1, "bias": 0.0}
    small = {"model": "test_resnet", "image_size": 32, "hidden_dim": 32, "output_dim": 16, "queue_size": 16}
    own = {"groups": 2, "mixup": 0.0, "ser": 0.5, "layer": "layer2", "reconstruction": 1.0, "unlabelled": "train"}
    own |= {"penalty": method, "temperature": 0.1, "mask_scale": 0.0, "open": False, "encoder": None}
    own |= {"epochs": 4, "batch_size": 8, "update_every": 1, "environments": None, "method": method}
    options = options_of(data, out, **{**values, **small, **own})
    found = images.read(options, "train")
    if step == "pretrain":
        return options, module.Objective(options, found), module.Views(options, 0)
    objective = module.Objective(options, len(found.classes))
    objective.irm.environments = Environments.split(torch.randn(len(found), 8), found.labels)
    return options, objective, module.TwoViews(options, 0)


def is_tensor(value):
    return isinstance(value, torch.Tensor)


def leaves(thing, name, saved, seen):
    """Name and value of all numbers, tensors and generators that can be reached, but for those in ``saved``."""
    if thing is None or isinstance(thing, (bool, int, float, str)):
        yield name, thing
    elif isinstance(thing, torch.Tensor):
        if thing.untyped_storage().data_ptr() not in saved:
            yield name, repr(thing.tolist())
    elif isinstance(thing, torch.Generator):
        yield name, repr(thing.get_state().tolist())
    elif isinstance(thing, random.Random):
        yield name, repr(thing.getstate())
    elif id(thing) not in seen and not isinstance(thing, type(importlib)):
        seen.add(id(thing))
        if isinstance(thing, dict):
            parts = [(f"{name}[{key!r}]", value) for key, value in thing.items()]
        elif isinstance(thing, (list, tuple, set)):
            parts = [(f"{name}[{i}]", value) for i, value in enumerate(thing)]
        else:
            parts = [(f"{name}.{key}", value) for key, value in getattr(thing, "__dict__", {}).items()]
        for part, value in parts:
            yield from leaves(value, part, saved, seen)


# ----------------------------------------------------------------------------------------------------- what it leaves


def outcome(folder):
    """All that a training left, for comparison bit for bit."""
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    states = [checkpoint[name] for name in ("step", "objective", "optimizer", "scaler", "skipped")]
    return [plain(state) for state in states], (folder / "log.jsonl").read_text(), (folder / "results.json").read_text()


def plain(state):
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, list):
        return [plain(value) for value in state]
    return state.tolist() if isinstance(state, torch.Tensor) else state
