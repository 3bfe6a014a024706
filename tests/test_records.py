"""Every public loss, by its record: what it computes, how precisely, and what it refuses."""

import copy
import math
import re
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import equireg
from equireg.similarity import choice, normalization
from tests.records import RECORDS
from tests.records.record import (
    AS_REFERENCE,
    BATCH,
    DTYPES,
    NO_ENTRIES,
    Refused,
    leaves,
    on_floats,
    outputs,
    take,
)
from tests.records.running import (
    copied,
    every_record,
    exactly,
    in_float64,
    modules,
    near,
    objective,
    parameters_of,
    same,
    state_of,
    step,
)

NO_LOSSES = {
    "BoxFiles",
    "ClassRisks",
    "ColorBias",
    "Environments",
    "EnvironmentsReport",
    "EquivariantViews",
    "FeatureMask",
    "GridTransform",
    "GroupAccuracy",
    "ImageFiles",
    "IntermediateViews",
    "LateClassToken",
    "PartitionReport",
    "PartitionUpdater",
    "Stability",
    "TokenTap",
    "WithIndex",
    "adjusted_similarity",
    "dense_probe",
    "detection_probe",
    "ensemble",
    "equivariance_score",
    "extract_features",
    "extract_two_views",
    "extract_view_features",
    "fit_ensemble_weights",
    "group_accuracy",
    "homography_probe",
    "k_shot",
    "knn_accuracy",
    "linear_probe",
    "mix_images",
    "mocov3_photometric",
    "perturbation_stability",
    "predict_tta",
    "read_domains",
    "read_image_folder",
    "read_nico",
    "read_vipriors",
    "read_voc",
    "split_batch",
    "transformation_accuracy",
    "transformation_r2",
    "weight_sheet",
    "within_class_variance",
}


def test_every_public_loss_has_a_record():
    recorded = {record.public_name for record in RECORDS}
    unknown = sorted(set(equireg.__all__) - recorded - NO_LOSSES)
    assert not unknown, (
        f"{', '.join(unknown)}: public, but without a record. "
        "A loss needs one in tests/records/ (docs/adding_a_method.md); what is no loss goes into NO_LOSSES above."
    )
    assert recorded | NO_LOSSES <= set(equireg.__all__), "no longer public"
    assert recorded.isdisjoint(NO_LOSSES)
    assert len({record.name for record in RECORDS}) == len(RECORDS)


def test_a_loss_without_a_record_is_told_what_to_do(monkeypatch):
    monkeypatch.setattr(equireg, "__all__", [*equireg.__all__, "ForgottenLoss"])
    with pytest.raises(AssertionError, match=r"ForgottenLoss: .* without a record.*needs one in tests/records/"):
        test_every_public_loss_has_a_record()


@every_record
def test_docstring_says_how_it_behaves_across_processes(record):
    said = getattr(equireg, record.public_name).__doc__
    assert re.search(r"\b(process(es)?|DistributedDataParallel|gather_distributed)\b", said)


# ------------------------------------------------------------------------------------------------ values, gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("record", "streamed"),
    [pytest.param(r, s, id=r.name + ", streamed" * s) for r in RECORDS for s in range(1 + r.streams)],
)
def test_values_and_gradients(record, streamed, dtype, monkeypatch):
    """And every input and parameter that should learn gets something finite to learn from."""
    if streamed:  # pair_lse chooses by size
        monkeypatch.setattr(choice, "_DENSE_ENTRIES", 0)
    loss, args = record.build(dtype), record.sample(dtype)
    scale = 2.0**10 if dtype == torch.float16 else 1.0  # as a gradient scaler, or small gradients vanish in fp16
    expected, expected_gradients = exactly(record, loss, args, scale)
    found, gradients = step(loss, args, scale)
    limit, limit_of_gradients = record.limits(dtype)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert near(mine, theirs, limit)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        assert mine.isfinite().all()
        assert mine.any()
        assert near(mine, theirs, limit_of_gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("record", modules, ids=lambda record: record.name)
def test_a_module_in_fp32_takes_features_of_any_dtype(record, dtype):
    """Outside of autocast: what comes out is what comes of the same features in fp32."""
    args = on_floats(lambda x: x.to(dtype))(record.sample(torch.float32))
    found, gradients = step(record.build(torch.float32), args)
    expected, _ = step(record.build(torch.float32), on_floats(lambda x: x.float())(args))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.float(), theirs, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("record", [r for r in modules if state_of(r.build())], ids=lambda record: record.name)
def test_features_on_another_device_than_the_module_are_named(record):
    args = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, record.sample())
    with pytest.raises(ValueError, match=rf"^{record.public_name}: \w+.* must be on cpu as .* is, got meta"):
        record.build()(*args)


@pytest.mark.parametrize("record", [r for r in RECORDS if leaves(r.sample())], ids=lambda record: record.name)
def test_gradcheck(record):
    loss, args = record.build(), take(record.sample(), slice(4))  # of three classes: two samples of one

    def call(*inputs):
        given = iter(inputs)
        rebuilt = tree_map(lambda x: next(given) if isinstance(x, torch.Tensor) and x.requires_grad else x, args)
        found = copy.deepcopy(loss)(*rebuilt)
        return [part.masked_fill(part == -math.inf, 0) for part in outputs(found)]  # of rows without a pair

    assert torch.autograd.gradcheck(call, leaves(args), atol=1e-8, rtol=1e-6)


class Calls(TorchDispatchMode):
    """Remembers the calls of the package's own operators."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "equireg":
            self.calls.setdefault(function, []).append(args)
        return function(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # raised inside opcheck itself
def test_opcheck_of_every_registered_operator(monkeypatch):  # K12
    """With arguments that they get from the losses; one that no loss calls fails."""
    monkeypatch.setattr(choice, "_DENSE_ENTRIES", 0)
    monkeypatch.setattr(normalization, "_ENTRIES", 0)
    forward, backward = Calls(), Calls()
    for record in RECORDS:
        loss, args = record.build(torch.float32), record.sample(torch.float32)
        with forward:
            total = objective(loss(*args))
        with backward:
            total.backward()
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("equireg::")}
    assert {op.name() for op in {*forward.calls, *backward.calls}} == registered
    for calls, learning in ((forward.calls, True), (backward.calls, False)):
        for operator, arguments in calls.items():
            for args in arguments[:: max(1, len(arguments) // 4)]:
                torch.library.opcheck(operator, tree_map(partial(copied, learning=learning), args))


def test_a_record_says_what_the_parts_of_each_loss_make():
    with_parts = {record.public_name for record in modules if hasattr(record.build(), "parts")}
    assert {record.public_name for record in RECORDS if record.made_of} == with_parts


@pytest.mark.parametrize("record", [record for record in RECORDS if record.made_of], ids=lambda record: record.name)
def test_parts_make_the_loss(record):
    """``parts`` gives the call's own bits, gradients and state; the rest is detached, and named as the formula is."""
    args, called, loss = record.sample(), record.build(), record.build()
    expected, parts = step(called, args), loss.parts(*args)
    gradients = torch.autograd.grad(objective(parts.loss), [*leaves(args), *parameters_of(loss).values()])
    assert same(([parts.loss], gradients, state_of(loss)), (*expected, state_of(called)))
    assert parts._fields[0] == "loss"
    assert not any(part.requires_grad for part in tree_leaves(tuple(parts[1:])))
    torch.testing.assert_close(record.made_of(parts), parts.loss.detach())
    if record.compiles:
        torch._dynamo.reset()
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):  # how many classes depends on the batch
            compiled = torch.compile(record.build().parts, fullgraph=True, backend="eager")(*args)
        torch.testing.assert_close(tree_leaves(compiled), tree_leaves(parts))


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("record", "case"), [pytest.param(r, case, id=f"{r.name}, {case}") for r in RECORDS for case in r.refused]
)
def test_refuses(record, case):
    """And before any state changes."""
    wrong = record.refused[case]
    loss = record.build() if not wrong.options else None
    before = copy.deepcopy(state_of(loss))
    with pytest.raises(wrong.error, match=wrong.message):
        (loss or record.build(**wrong.options))(*wrong.change(record.sample()))
    assert same(state_of(loss), before)


DEGENERATE = {
    "empty": lambda args: take(args, slice(0)),
    "one": lambda args: take(args, slice(1)),
    "identical": on_floats(lambda x: x[:1].expand_as(x).clone() if x.dim() else x),
    "zero": on_floats(lambda x: x.index_fill(0, torch.tensor([0, 5]), 0) if x.dim() and len(x) == BATCH else x),
}


@every_record
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_batches(record, case, dtype):  # F6, F8, F9, F10
    """No NaN and no silent zero: the result that the record states, with finite gradients."""
    loss, args = record.build(dtype), DEGENERATE[case](record.sample(dtype))
    expected = getattr(record, case)
    if isinstance(expected, Refused):
        with pytest.raises(expected.error, match=expected.message):
            loss(*args)
        return
    if expected == AS_REFERENCE:
        expected = record.reference(*in_float64(loss, args))
    found, gradients = step(loss, args)
    assert all(gradient.isfinite().all() for gradient in gradients)
    if expected == NO_ENTRIES:
        assert all(part.numel() == 0 for part in found)
        return
    expected = expected if isinstance(expected, tuple) else (expected,)
    for mine, theirs in zip(found, expected, strict=True):
        theirs = torch.as_tensor(theirs, dtype=torch.float64).detach().expand_as(mine)
        torch.testing.assert_close(mine.double(), theirs, rtol=10 * record.limits(dtype)[0], atol=1e-6)


@every_record
def test_nan_is_not_masked(record):  # F15
    """In any argument: the loss is NaN, or refuses it."""
    args = tree_map(lambda x: copied(x, False), record.sample())
    count = len([x for x in tree_leaves(args) if isinstance(x, torch.Tensor) and x.is_floating_point()])
    for place in range(count):
        left = iter(range(count))
        spoiled = on_floats(lambda x, left=left, place=place: spoiled_first(x) if next(left) == place else x)(args)
        try:
            found = outputs(record.build()(*spoiled))
        except ValueError as error:
            found = [torch.tensor(math.nan)] if "got nan" in str(error) else []
        assert any(part.isnan().any() for part in found)


def spoiled_first(x):
    x = x.clone()
    x.view(-1)[0] = math.nan
    return x
