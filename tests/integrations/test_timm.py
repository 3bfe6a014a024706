"""EqInv in timm's train.py: the patch of docs/guides/timm.md in a small loop of timm's own parts."""

import copy
import os
import re
import subprocess
import sys
import textwrap
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

timm = pytest.importorskip("timm", reason="needs timm, of the examples extra")
pytest.importorskip("timm.task", reason="needs a timm with tasks")

from timm.data import create_dataset, create_loader, resolve_data_config  # noqa: E402
from timm.models.volo import VOLO  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint  # noqa: E402
from timm.utils import CheckpointSaver  # noqa: E402

from equireg import ClassWiseIRM, Environments, WithIndex  # noqa: E402
from equireg.integrations._mixtures import Mixture  # noqa: E402
from equireg.integrations.timm import EqInvTask, FastCollateMixup, Mixup  # noqa: E402

# timm's data sets leave the files of images open.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")

ROOT = Path(__file__).parent.parent.parent
DIFF = re.search(r"^```diff\n(.*?)^```", (ROOT / "docs/guides/timm.md").read_text(), re.S | re.M)[1]
HUNKS = re.split(r"^@@.*\n", DIFF, flags=re.M)[1:]
IMPORTS, DATASET, TASK = (
    textwrap.dedent("\n".join(line[1:] for line in hunk.splitlines() if line[0] == "+")) for hunk in HUNKS
)
REST_OF_THE_CALL = "model=model, device=device, verbose=False, criterion_kwargs=loss_kwargs)"
MODEL = "test_resnet"  # timm's own for tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 8), ("validation", 2)):
        for label, kind in enumerate("abc"):
            (root / split / kind).mkdir(parents=True)
            for i in range(count):
                colour = (80 * label, 25 * i, 40 * (i % 3))
                Image.new("RGB", (40, 40), colour).save(root / split / kind / f"{i}.png")
    return root


def patched(folder, prefetcher=True, resume="", smoothing=0.1, soft=False, collate_fn=None):
    """What the patched main() makes of its arguments, by the lines of the guide."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=3)
    names = {
        "__name__": "train",
        "args": Namespace(num_classes=3, resume=resume, batch_size=6, workers=0),
        "create_loader": create_loader,
        "data_config": resolve_data_config({"img_size": 32}, model=model),
        "dataset_train": create_dataset("", root=folder, split="train", is_training=True),
        "device": torch.device("cpu"),
        "loss_kwargs": {"soft_targets": True} if soft else {"smoothing": smoothing},
        "model": model,
    }
    exec(f"{IMPORTS}\n{DATASET}", names)  # noqa: S102
    loader = create_loader(
        names["dataset_train"],
        32,
        6,
        is_training=True,
        num_workers=0,
        device=names["device"],
        use_prefetcher=prefetcher,
        collate_fn=collate_fn,
    )
    exec(f"{TASK}\n{REST_OF_THE_CALL}", names)  # noqa: S102
    task = names["task"]
    return task, loader, create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.05)


def train(task, loader, optimizer, epoch, accumulate=1, autocast=False):
    torch.manual_seed(100 + epoch)  # the order of the samples
    task.get_trainable_module().train()
    optimizer.zero_grad()
    for step, (images, target) in enumerate(loader, 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = task(images, target)["loss"] / accumulate
        loss.backward()
        if step % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema()
        assert loss.isfinite()


def batch_of(loader):
    torch.manual_seed(5)
    return next(iter(loader))


def test_the_patch_is_short():
    changed = [line for line in DIFF.splitlines() if re.match(r"[-+](?!--|\+\+)", line)]
    assert 5 < len(changed) <= 15


@pytest.mark.parametrize("prefetcher", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_loss_is_that_of_the_formula(folder, prefetcher, autocast):
    """Sample by sample, with label smoothing written out, from the plain model's features."""
    task, loader, _ = patched(folder, prefetcher)
    images, target = batch_of(loader)
    labels, indices = WithIndex.labels_and_indices(target)
    masked = task.get_trainable_module().train()
    assert masked.sharpness == "auto"  # on so few images all alike
    masked.sharpness = 1.0
    irm, plain = copy.deepcopy(masked.irm), timm.create_model(MODEL, num_classes=3).train()
    plain.load_state_dict(masked.model.state_dict())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = task(images, target)
        features = plain.forward_head(plain.forward_features(images), pre_logits=True)
        logits = plain.get_classifier()(irm.mask(features))
        expected = irm(features, labels, indices)
    weights = irm.environments.weights()
    assert len(set(weights[indices].tolist())) > 2
    for i, (label, index) in enumerate(target.tolist()):
        logs = logits[i].float().log_softmax(0)
        expected = expected - weights[index] * (0.9 * logs[label] + 0.1 * logs.mean()) / len(target)
    assert result["loss"].dtype == torch.float32
    torch.testing.assert_close(result["loss"], expected, rtol=1e-3 if autocast else 1e-6, atol=1e-6)
    torch.testing.assert_close(result["output"], logits)


MIXING = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1, "num_classes": 3}


def draw_from(seed):
    np.random.seed(seed)  # noqa: NPY002  # timm draws from NumPy's global generator


@pytest.mark.parametrize("mode", ["batch", "pair", "elem", "half"])
def test_mixtures_are_timms_and_know_their_samples(mode):
    """Both ways of timm: the same pixels and the same soft labels as its own, from the same random numbers."""
    pixels = np.random.default_rng(0).integers(256, size=(6, 3, 32, 32), dtype=np.uint8)
    target = torch.tensor([[0, 8], [1, 3], [2, 9], [0, 1], [1, 0], [1, 7]])
    ways = [lambda mix: mix([(image.copy(), label) for image, label in zip(pixels, targets.numpy())])]
    kinds = [(timm.data.FastCollateMixup, FastCollateMixup)]
    if mode != "half":  # of collating alone
        ways.append(lambda mix: mix(torch.from_numpy(pixels).float(), targets))
        kinds.append((timm.data.Mixup, Mixup))
    for (theirs, ours), way in zip(kinds, ways):
        seen = set()
        for seed in range(6):
            draw_from(seed)
            targets = target[:, 0]
            expected, soft = way(theirs(mode=mode, **MIXING))
            draw_from(seed)
            targets = target
            images, mixed = way(ours(mode=mode, **MIXING))
            assert torch.equal(images, expected)
            mixture = Mixture.of(mixed)
            first, other = mixture.soft(3)
            torch.testing.assert_close(other.lerp(first, mixture.share[:, None]), soft)
            count = len(images)
            assert mixture.indices.tolist() == target[:count, 1].tolist()
            assert mixture.other_indices.tolist() == target.flip(0)[:count, 1].tolist()
            seen |= {round(share, 3) for share in mixture.share.tolist()}
        assert len(seen) > 4


@pytest.mark.parametrize(("sharpness", "autocast"), [(1.0, False), (0, False), (1.0, True)])
def test_the_loss_of_mixtures_is_that_of_the_formula(folder, sharpness, autocast):
    """Both samples of a mixture by share, weight and smoothed label; to IRM it is the larger one."""
    task, loader, _ = patched(folder, soft=True)
    images, target = batch_of(loader)
    draw_from(3)
    images, mixed = Mixup(mode="elem", **MIXING)(images, target)
    masked = task.get_trainable_module().train()
    masked.sharpness = sharpness
    irm, plain = copy.deepcopy(masked.irm), timm.create_model(MODEL, num_classes=3).train()
    plain.load_state_dict(masked.model.state_dict())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = task(images, mixed)
        features = plain.forward_head(plain.forward_features(images), pre_logits=True)
        logits = plain.get_classifier()(irm.mask(features)).float()
    shares = mixed[:, 4].tolist()
    assert min(shares) < 0.4
    assert max(shares) > 0.6
    larger = [i if share >= 0.5 else 5 - i for i, share in enumerate(shares)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = irm(features, *target[larger].unbind(1))
    weights = irm.environments.weights(sharpness=1.0) if sharpness else torch.ones(24)
    for i, share in enumerate(shares):
        logs = logits[i].log_softmax(0)
        for part, (label, index) in ((share, target[i].tolist()), (1 - share, target[5 - i].tolist())):
            expected = expected - part * weights[index] * (0.9 * logs[label] + 0.1 * logs.mean()) / 6
    assert result["loss"].dtype == torch.float32
    torch.testing.assert_close(result["loss"], expected, rtol=1e-3 if autocast else 1e-5, atol=1e-6)


def test_an_epoch_of_mixtures_through_the_prefetcher(folder):
    task, loader, optimizer = patched(folder, soft=True, collate_fn=FastCollateMixup(**MIXING))
    before = copy.deepcopy(task.get_trainable_module().state_dict())
    train(task, loader, optimizer, 0)
    assert not torch.equal(before["irm.mask.weight"], task.get_trainable_module().state_dict()["irm.mask.weight"])
    loader.mixup_enabled = False  # as train.py does from --mixup-off-epoch on
    images, mixed = next(iter(loader))
    assert mixed[:, 4].tolist() == [1.0] * 6
    assert task(images, mixed)["loss"].isfinite()


def test_environments_are_those_of_the_model_and_the_folder(folder):
    """Fitted before the transform for training came to the same data set."""
    task, _, _ = patched(folder)
    masked = task.get_eval_model()
    plain = timm.create_model(MODEL, num_classes=0).eval()
    plain.load_state_dict(masked.model.state_dict(), strict=False)
    config = resolve_data_config({"img_size": 32}, model=plain)
    dataset = create_dataset("", root=folder, split="train")
    loader = create_loader(dataset, batch_size=24, use_prefetcher=False, num_workers=0, **config)
    ((images, labels),) = loader
    with torch.no_grad():
        expected = Environments.split(plain(images), labels, score="margin")
    for name, buffer in expected.named_buffers():
        found = getattr(masked.irm.environments, name)
        if name == "scores":
            torch.testing.assert_close(found.view(torch.float32), buffer.view(torch.float32), rtol=1e-3, atol=1e-3)
        else:
            assert torch.equal(found, buffer), name


def test_moving_average(folder):
    """Each tensor moves once a step, the environments are copied, and the average has a mask of its own."""
    task, loader, optimizer = patched(folder)
    ema = task.setup_ema(decay=0.75)
    expected = copy.deepcopy(task.get_trainable_module().state_dict())
    before = {name: value.clone() for name, value in expected.items()}
    images, target = batch_of(loader)
    for _ in range(2):
        task(images, target)["loss"].backward()
        optimizer.step()
        task.update_ema()
        for name, value in task.get_trainable_module().state_dict().items():
            expected[name] = expected[name].lerp(value, 0.25) if value.is_floating_point() else value.clone()
    for name, value in ema.module.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert not torch.equal(ema.module.irm.mask.weight, before["irm.mask.weight"])
    with torch.no_grad():
        first = task.get_eval_model(ema=True)(images)
        task.get_trainable_module().irm.mask.weight.fill_(-9.0)
        assert torch.equal(task.get_eval_model(ema=True)(images), first)


def test_accumulated_gradients_are_those_of_the_batches(folder):
    task, loader, _ = patched(folder)
    batches = [batch_of(loader)] * 2
    masked = task.get_trainable_module().train()
    ends = []
    for share in (1, 2):
        masked.zero_grad()
        for images, target in batches[:share]:
            (task(images, target)["loss"] / share).backward()
        ends.append([p.grad.clone() for p in masked.parameters()])
    assert sum(float(gradient.norm()) for gradient in ends[0]) > 1
    for one, two in zip(*ends):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("autocast", [False, True])
def test_resumed_bit_for_bit_and_loaded_by_plain_timm(folder, tmp_path, autocast):
    task, loader, optimizer = patched(folder)
    task.setup_ema(decay=0.9)
    for epoch in range(2):
        train(task, loader, optimizer, epoch, accumulate=2, autocast=autocast)
        if epoch == 0:
            saver = CheckpointSaver(task.get_trainable_module(), optimizer, checkpoint_dir=tmp_path, task=task)
            saver.save_checkpoint(epoch, metric=1.0)
            images, _ = batch_of(loader)
            with torch.no_grad():
                outputs = [task.get_eval_model(ema=ema).eval()(images) for ema in (False, True)]
    path = str(tmp_path / "last.pth.tar")

    again, loader, optimizer = patched(folder, resume=path)
    assert not again.get_eval_model().irm.environments.fitted
    assert resume_task_checkpoint(again, path, optimizer=optimizer) == 1
    again.setup_ema(decay=0.9)
    load_task_ema_checkpoint(again, path)
    train(again, loader, optimizer, 1, accumulate=2, autocast=autocast)
    for ema in (False, True):
        mine, theirs = (t.get_trainable_module(ema=ema).state_dict() for t in (task, again))
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)

    for output, use_ema in zip(outputs, (False, True)):
        plain = timm.create_model(MODEL, num_classes=3)
        timm.models.load_checkpoint(plain, path, use_ema=use_ema)
        torch.testing.assert_close(plain.eval()(images), output)


SMALL_VOLO = partial(VOLO, layers=(1, 1, 1, 1), embed_dims=(32,) * 4, num_heads=(2,) * 4)


@pytest.mark.parametrize("name", ["test_vit", "test_mambaout", "mobilenetv3_small_050", "volo"])
def test_the_folded_state_classifies_as_the_masked_model(name):
    """Of mobile networks, whose classifier is timm's own subclass, and of VOLO, which adds a second one, too."""
    make = partial(SMALL_VOLO if name == "volo" else partial(timm.create_model, name), num_classes=3)
    model, plain, images = make(), make().eval(), torch.rand(1, 3, *([224, 224] if name == "volo" else [160, 160]))
    task = EqInvTask(model, irm=ClassWiseIRM(model.get_classifier().in_features, 3), verbose=False)
    plain.load_state_dict(task.get_checkpoint_state()["state_dict"])
    with torch.no_grad():
        torch.testing.assert_close(plain(images), task.get_eval_model().eval()(images), rtol=1e-4, atol=1e-5)


def test_adaptive_clipping_leaves_out_the_classifier(folder):
    task, _, _ = patched(folder)
    head = set(task.get_trainable_module().model.get_classifier().parameters())
    everyone, without = (set(task.get_clip_parameters(exclude_head=exclude)) for exclude in (False, True))
    assert everyone - without == head
    assert len(head) == 2


def test_what_is_refused(folder, tmp_path):
    model = timm.create_model(MODEL, num_classes=3)
    width = model.get_classifier().in_features
    irm = ClassWiseIRM(width, 3)
    with pytest.raises(ValueError, match=r"criterion must be .* sharpness=0, got BinaryCrossEntropy"):
        EqInvTask(copy.deepcopy(model), irm=irm, criterion_kwargs={"loss_type": "bce"}, verbose=False)
    EqInvTask(copy.deepcopy(model), irm=irm, sharpness=0, criterion_kwargs={"loss_type": "bce"}, verbose=False)
    for options in ({"weight": torch.tensor([1.0, 1.0, 9.0])}, {"ignore_index": 2}, {"reduction": "sum"}):
        criterion = torch.nn.CrossEntropyLoss(**options)
        with pytest.raises(ValueError, match=r"criterion must be .* the mean of .* got CrossEntropyLoss"):
            EqInvTask(copy.deepcopy(model), irm=irm, criterion=criterion, verbose=False)
        EqInvTask(copy.deepcopy(model), irm=irm, sharpness=0, criterion=criterion, verbose=False)
    with pytest.raises(ValueError, match=r"for the model's \d+ features and 3 classes, got \d+ and 4"):
        EqInvTask(model, irm=ClassWiseIRM(width, 4))
    with pytest.raises(ValueError, match=r"no scale.*got 10.0"):
        EqInvTask(model, irm=ClassWiseIRM.released(width, 3))
    with pytest.raises(TypeError, match=r"nn.Linear as classifier, got tuple"):
        EqInvTask(timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3), irm=irm)
    with pytest.raises(TypeError, match="irm must be a ClassWiseIRM, got Linear"):
        EqInvTask(model, irm=torch.nn.Linear(2, 2))

    wrapped = copy.deepcopy(model)
    EqInvTask(wrapped, irm=irm, verbose=False)
    for again in (wrapped, copy.deepcopy(wrapped)):
        with pytest.raises(ValueError, match="model must be without a mask; create it anew, got one that an EqInvTask"):
            EqInvTask(again, irm=ClassWiseIRM(width, 3), verbose=False)

    torch.save({"state_dict": model.state_dict()}, tmp_path / "plain.pth.tar")
    with pytest.raises(ValueError, match="one that EqInvTask saved; start from another by --initial-checkpoint"):
        resume_task_checkpoint(patched(folder)[0], str(tmp_path / "plain.pth.tar"))
    task, loader, _ = patched(folder)
    images, target = batch_of(loader)
    soft = timm.data.Mixup(num_classes=3)(images.clone(), target[:, 0])[1]
    with pytest.raises(TypeError, match="mixtures, as of Mixup or CutMix, have no index"):
        task(images, soft)
    with pytest.raises(ValueError, match=r"\[B, 2\] of whole numbers, as WithIndex.*got \[6\]"):
        task(images, target[:, 0])
    of_mixtures = EqInvTask(copy.deepcopy(model), irm=irm, criterion_kwargs={"soft_targets": True}, verbose=False)
    of_six_classes = timm.data.Mixup(num_classes=6)(images.clone(), target[:, 0])[1]
    for theirs in (soft, target, of_six_classes):
        with pytest.raises(ValueError, match=r"\[B, 6\], as of Mixup .* have no index, got torch.* \[6, [236]\]"):
            of_mixtures(images, theirs)
    thresholded = {"loss_type": "bce", "soft_targets": True, "bce_target_thresh": 0.2}
    with pytest.raises(ValueError, match=r"criterion must be cross entropy .* sharpness=0, got BinaryCrossEntropy"):
        EqInvTask(copy.deepcopy(model), irm=irm, criterion_kwargs=thresholded, verbose=False)
    with pytest.raises(ValueError, match="multi_label must be False"):
        Mixup(multi_label=True)
    with pytest.raises((RuntimeError, ValueError)):  # the unpatched task does not train on indices in silence
        ClassificationTask(model, verbose=False)(images, target)


def test_without_weights_the_criterion_is_timms(folder):
    task, loader, _ = patched(folder)
    images, target = batch_of(loader)
    labels, indices = WithIndex.labels_and_indices(target)
    plain = EqInvTask(
        timm.create_model(MODEL, num_classes=3), irm=task.get_eval_model().irm, sharpness=0, verbose=False
    )
    result = plain(images, target)
    assert plain.get_trainable_module()(images, labels, indices)[2] is None
    assert result["loss"] > F.cross_entropy(result["output"], labels)


def test_the_patch_of_a_real_train_py(folder, tmp_path):
    """Two epochs, then one more by --resume."""
    script = os.environ.get("EQUIREG_TIMM_TRAIN")
    if not script:
        pytest.skip("EQUIREG_TIMM_TRAIN is not set: it names the train.py that belongs to the installed timm")
    (tmp_path / "train.py").write_bytes(Path(script).read_bytes())
    subprocess.run(["patch", "-p1"], input=DIFF, text=True, check=True, cwd=tmp_path)  # noqa: S607

    def run(*options):
        words = f"--data-dir {folder} --model {MODEL} --num-classes 3 --img-size 32 -b 6 -j 0 --device cpu --lr 0.01"
        words += " --model-ema --model-ema-decay 0.5 --grad-accum-steps 2 --amp --amp-dtype bfloat16 --output out"
        call = [sys.executable, "train.py", *words.split(), "--warmup-epochs", "0", *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, env=environment)  # noqa: S603

    result = run("--epochs", "2", "--experiment", "first")
    assert result.returncode == 0, result.stderr
    last = tmp_path / "out/first/last.pth.tar"
    result = run("--epochs", "3", "--experiment", "second", "--no-prefetcher", "--resume", str(last))
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "out/second/summary.csv").read_text().splitlines()) == 2
    timm.create_model(MODEL, num_classes=3, checkpoint_path=str(last))
    for more in ([], ["--no-prefetcher"]):
        result = run("--epochs", "1", "--mixup", "0.5", "--cutmix", "1.0", *more)
        assert result.returncode == 0, result.stderr


def test_public_name():
    names = (ROOT / "tests/public_names.txt").read_text().split()
    for name in ("EqInvTask", "FastCollateMixup", "Mixup"):
        assert f"equireg.integrations.timm.{name}" in names
