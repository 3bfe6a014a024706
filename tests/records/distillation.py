"""Records of Stage II's losses."""

import torch

from equireg import ContrastiveDistillation, DistillationLoss, FeatureDistillation, OverhaulDistillation
from tests import loss_references
from tests.records.record import AS_REFERENCE, BATCH, Record, Refused, refused_type, replace


def _overhaul(**options):
    loss = OverhaulDistillation([3, 5], [4, 6], **{"layer_weights": [0.3, 2.0], **options})
    generator = torch.Generator().manual_seed(4)
    loss.fit_margins([[torch.randn(8, dim, 2, 2, generator=generator) for dim in (4, 6)]])
    return loss


def _maps(draw, dims, grad):
    return [draw.floats(BATCH, dim, 2, 2, grad=grad) for dim in dims]


def _contrastive(**options):
    """After a first batch: there Z is a constant to the gradient, and yet moves with the features."""
    settings = {"embedding_dim": 4, "num_negatives": 6, "temperature": 0.5, **options}
    loss = ContrastiveDistillation(5, 7, 30, **settings)
    generator = torch.Generator().manual_seed(6)
    loss(torch.randn(4, 5, generator=generator), torch.randn(4, 7, generator=generator), torch.arange(4))
    return loss


def _number(name, value, rule):
    return Refused(ValueError, f"{name} must be {rule}, got {value}", options={name: value})


HOW = {"temperature": 2.0, "alpha": 0.7, "beta": 3.0, "label_smoothing": 0.2}  # none of them the default
RECORDS = [
    Record(
        name="DistillationLoss",
        make=lambda **options: DistillationLoss(**{**HOW, **options}),
        inputs=lambda draw: (draw.floats(BATCH, 5), draw.floats(BATCH, 5, grad=False), draw.labels(5)),
        reference=lambda p, *args: loss_references.distillation(*args, *HOW.values()),
        made_of=lambda parts: 0.7 * parts.cross_entropy + 3 * parts.divergence,
        refused={
            "F2 whole numbers": refused_type(0, "DistillationLoss: student"),
            "F4 classes": Refused(
                ValueError, r"teacher must be \[B, C\] = \[12, 5\], got \[12, 4\]", replace(1, lambda t: t[:, 1:])
            ),
            "F32 labels": Refused(ValueError, "labels must be in 0 .. 4 .* got 5 at", replace(2, lambda y: y + 1)),
            "F12 temperature": _number("temperature", 0, "finite and above 0"),
            "F34 beta": _number("beta", -1, "finite and at least 0"),
        },
        empty=Refused(ValueError, r"student must be of at least one sample and class, got \[0, 5\]"),
        processes="mean",
        one=AS_REFERENCE,
        frozen=(1,),
    ),
    Record(
        name="FeatureDistillation",
        make=lambda **options: FeatureDistillation(5, 7, **options),
        inputs=lambda draw: (draw.floats(BATCH, 3, 5), draw.floats(BATCH, 3, 7, grad=False)),
        reference=lambda p, *args: loss_references.feature_distillation(p, *args, temperature=1.0),
        made_of=lambda parts: parts.divergence.mean(),
        refused={
            "F2 whole numbers": refused_type(0, "FeatureDistillation: student"),
            "F4 places": Refused(
                ValueError, r"teacher must be .* \[12, 3\], got \[12, 2\]", replace(1, lambda t: t[:, 1:])
            ),
            "F12 temperature": _number("temperature", 0, "finite and above 0"),
        },
        empty=Refused(ValueError, r"student must be of at least one sample, got \[0, 3, 5\]"),
        processes="mean",
        one=AS_REFERENCE,
        frozen=(1,),
        half_module=True,
    ),
    Record(
        name="FeatureDistillation/maps of one width",
        make=lambda **options: FeatureDistillation(5, temperature=2.0, **options),
        inputs=lambda draw: (draw.floats(BATCH, 5, 2, 2), draw.floats(BATCH, 5, 2, 2, grad=False)),
        reference=lambda p, *maps: loss_references.divergence(*(x.movedim(1, -1) for x in maps), temperature=2.0),
        made_of=lambda parts: parts.divergence.mean(),
        refused={"F1 a list": Refused(TypeError, "teacher must be a tensor .* got list", replace(1, [1.0]))},
        empty=Refused(ValueError, r"student must be of at least one sample, got \[0, 5, 2, 2\]"),
        processes="mean",
        one=AS_REFERENCE,
        frozen=(1,),
    ),
    Record(
        name="OverhaulDistillation",
        make=_overhaul,
        inputs=lambda draw: (_maps(draw, (3, 5), True), _maps(draw, (4, 6), False)),
        reference=lambda p, *args: loss_references.overhaul(p, *args, layer_weights=(0.3, 2.0)),
        made_of=lambda parts: 0.3 * parts.distances[0] + 2 * parts.distances[1],
        refused={
            "layers": Refused(ValueError, "students must be a list of 2 layers, got 1", replace(0, lambda x: x[:1])),
            "F3 width": Refused(ValueError, r"student must be .* got \[12, 5, 2, 2\]", replace(0, lambda x: x[::-1])),
            "F34 weights": Refused(
                ValueError, "layer_weights must be finite .* got -1", options={"layer_weights": [1, -1]}
            ),
        },
        empty=Refused(ValueError, r"student must be of at least one sample, got \[0, 3, 2, 2\]"),
        one=AS_REFERENCE,
        frozen=(1,),
        half_module=True,
    ),
    Record(
        name="ContrastiveDistillation",
        make=_contrastive,
        inputs=lambda draw: (draw.floats(BATCH, 5), draw.floats(BATCH, 7, grad=False), draw.indices(30)),
        reference=lambda p, *args: loss_references.contrastive(p, *args, temperature=0.5, negatives=6),
        made_of=lambda parts: parts.student + parts.teacher,
        refused={
            "F2 whole numbers": refused_type(0, "ContrastiveDistillation: student"),
            "F3 width": Refused(
                ValueError, r"student must be \[B, 5\] .* got \[12, 4\]", replace(0, lambda x: x[:, 1:])
            ),
            "E5 indices": Refused(ValueError, "indices must be in 0 .. 29 .* got 30", replace(2, lambda i: 0 * i + 30)),
            "F12 temperature": _number("temperature", 0, "finite and above 0"),
        },
        empty=Refused(ValueError, r"student must be \[B, 5\] of at least one sample, got \[0, 5\]"),
        one=AS_REFERENCE,
        frozen=(1,),
        half_module=True,
        compiles=False,  # it draws negatives from a generator of its own, whose state is a buffer
    ),
]
