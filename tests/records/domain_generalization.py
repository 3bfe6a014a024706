"""Records of the losses for unseen domains: spectral decoupling and SelfReg."""

from torch import nn

from equireg import SelfRegLoss, spectral_decoupling
from tests import loss_references
from tests.records.record import AS_REFERENCE, BATCH, Record, Refused, refused_type, replace


def _squares(p, logits):
    """λ = 0.1, logit by logit."""
    squares = [logit**2 for row in logits for logit in row]
    return 0.1 / 2 * sum(squares) / max(len(squares), 1)


def _decoupling(**options):
    return lambda logits: spectral_decoupling(logits, **options)


def _selfreg(**options):
    settings = {"projection": nn.Linear(5, 5), "feature_weight": 0.4, "logit_weight": 0.8, **options}
    return SelfRegLoss(5, **settings)


RECORDS = [
    Record(
        name="spectral_decoupling",
        make=_decoupling,
        inputs=lambda draw: (draw.floats(BATCH, 5),),
        reference=_squares,
        refused={
            "F2 whole numbers": refused_type(0, "spectral_decoupling: logits"),
            "F3 rank": Refused(ValueError, r"logits must be \[B, C\], got \[12\]", replace(0, lambda z: z[:, 0])),
            "F34 weight": Refused(ValueError, "weight must be finite and at least 0, got -1", options={"weight": -1}),
        },
        empty=0.0,
        one=AS_REFERENCE,
        processes="mean",
    ),
    Record(
        name="SelfRegLoss",
        make=_selfreg,
        inputs=lambda draw: (draw.floats(BATCH, 5), draw.floats(BATCH, 4), draw.labels(3), 0.3),
        reference=lambda p, *args: loss_references.selfreg(p, *args, weights=(0.4, 0.8)),
        made_of=lambda parts: 0.4 * parts.features + 0.8 * parts.logits,
        refused={
            "F2 whole numbers": refused_type(1, "SelfRegLoss: logits"),
            "F3 width": Refused(ValueError, r"features must be .* got \[12, 4\]", replace(0, lambda x: x[:, 1:])),
            "labels": Refused(TypeError, "labels must be a tensor of whole", replace(2, lambda y: y / 2)),
            "share": Refused(ValueError, "share must be in 0 .. 1, got 1.5", replace(3, 1.5)),
            "F34 weight": Refused(ValueError, "logit_weight must be .* got -1", options={"logit_weight": -1}),
            "width": Refused(
                ValueError, r"projection must be from .* got \[12, 1\]", options={"projection": nn.Linear(5, 1)}
            ),
            "projection": Refused(TypeError, "projection must be a module or", options={"projection": "linear"}),
        },
        empty=Refused(ValueError, r"features must be of at least one sample, got \[0, 5\]"),
        one=AS_REFERENCE,
        half_module=True,
    ),
]
