"""Records of EqInv: risks, penalties, the class-wise loss."""

import torch
from torch import nn

from equireg import ClassWiseIRM, Environments, class_wise_risks, irmv1_penalty, rex_penalty
from tests import loss_references, references
from tests.records.record import AS_REFERENCE, BATCH, NO_ENTRIES, Record, Refused, refused_type, replace

_DATASET = torch.randn(30, 6, generator=torch.Generator().manual_seed(5))
_LABELS = torch.arange(30) % 3


def _risks(**options):
    def call(z, labels, similar, temperature):
        return class_wise_risks(z, labels, similar, **{"temperature": temperature, **options})

    return call


def _risks_reference(denominator):
    def reference(p, z, labels, similar, temperature):
        risks, slopes = [], []
        for k in sorted(set(labels.tolist())):
            for e in (0, 1):

                def of_class(theta, k=k, e=e):
                    return [references.class_risk(z, labels, similar, k, e, temperature, denominator, theta)]

                risks += of_class(torch.ones((), dtype=torch.float64))
                slopes += references.slope(of_class)
        return torch.stack(risks).view(-1, 2), torch.stack(slopes).view(-1, 2)

    return reference


def _batch(draw, grad=True):
    """Features of four samples of each of three classes, their labels and indices in the dataset."""
    indices = torch.stack([torch.randperm(10, generator=draw.generator)[:4] * 3 + k for k in range(3)])
    indices = indices.flatten()[torch.randperm(BATCH, generator=draw.generator)]
    return draw.floats(BATCH, 6, grad=grad), _LABELS[indices], indices


def _irm(**fixed):
    def make(**options):
        projection = {} if "projection" in fixed else {"projection": nn.Linear(6, 5)}
        arguments = {**projection, **fixed, **options}
        return ClassWiseIRM(6, 3, **arguments).fit_environments(_DATASET, _LABELS)

    return make


def _irm_reference(weighted=False, **settings):
    def reference(p, features, labels, indices=None):
        if indices is None:  # the split made of the batch alone
            similar = loss_references.environment_table(features.detach(), labels, labels, range(len(labels)))
        else:
            similar = loss_references.environment_table(_DATASET, _LABELS, labels, indices)
        # The weights have a test of their own.
        weights = Environments.split(_DATASET, _LABELS).weights(indices) if weighted else None
        return loss_references.class_wise_irm(
            p, features, labels, similar, temperature=0.1, weights=weights, **settings
        )

    return reference


def _of_classes(weight):
    return lambda parts: (parts.risk.sum(1) + weight * parts.penalty).mean()


_IRM_REFUSED = {
    "F2 whole numbers": refused_type(0, "ClassWiseIRM: features"),
    "F31 labels": Refused(TypeError, "labels must be .* got torch.float32", replace(1, torch.ones(BATCH))),
    "F32 labels": Refused(ValueError, "labels must be in 0 .. 2 .* got 3 at", replace(1, lambda y: y + 1)),
    "F34 weight": Refused(ValueError, "weight must be finite and at least 0, got -1", options={"weight": -1}),
}


def _penalty(function, value, reference):
    return Record(
        name=function.__name__,
        make=lambda: function,
        inputs=lambda draw: (draw.floats(BATCH, 3),),
        reference=lambda p, rows: torch.stack([reference(list(row)) for row in rows]),
        refused={
            "F2 whole numbers": refused_type(0, f"{function.__name__}: {value}"),
            "no environment": Refused(
                ValueError, r"over at least one environment, got \[12, 0\]", replace(0, torch.ones(BATCH, 0))
            ),
        },
        empty=NO_ENTRIES,
        one=AS_REFERENCE,
    )


def _variance(risks):
    average = sum(risks) / len(risks)
    return sum((risk - average) ** 2 for risk in risks) / (len(risks) - 1)


RECORDS = [
    _penalty(rex_penalty, "risk", _variance),
    _penalty(irmv1_penalty, "slope", lambda slopes: sum(slope**2 for slope in slopes)),
    *(
        Record(
            name=f"class_wise_risks/{denominator}",
            make=lambda denominator=denominator, **options: _risks(**{"denominator": denominator, **options}),
            inputs=lambda draw: (
                draw.floats(BATCH, 6),
                draw.labels(3),
                draw.booleans(BATCH, BATCH),
                torch.tensor(0.3, dtype=draw.dtype, requires_grad=True),  # F14
            ),
            reference=_risks_reference(denominator),
            refused={
                "F2 whole numbers": refused_type(0, "class_wise_risks: z"),
                "similar": Refused(
                    ValueError,
                    r"similar must be \[B, B\] = \[12, 12\], got \[12, 11\]",
                    replace(2, lambda similar: similar[:, 1:]),
                ),
                "F12 temperature": Refused(ValueError, "temperature must .* got -1.0", options={"temperature": -1.0}),
                "F27 denominator": Refused(ValueError, "denominator must .* got 'Own'", options={"denominator": "Own"}),
            },
            empty=NO_ENTRIES,
            one=NO_ENTRIES,
            compile_options={"capture_dynamic_output_shape_ops": True},  # K depends on the labels
        )
        for denominator in ("own", "all")
    ),
    Record(
        name="ClassWiseIRM",
        make=_irm(projection=None, detach=True),
        inputs=lambda draw: _batch(draw, grad=False),
        reference=_irm_reference(weight=10.0, penalty="rex", denominator="own"),
        made_of=_of_classes(weight=10.0),
        refused=_IRM_REFUSED,
        empty=0.0,
        one=0.0,
        frozen=(0,),
    ),
    Record(
        name="ClassWiseIRM/irmv1",
        make=_irm(penalty="irmv1", denominator="all", weight=2.0, detach=False),
        inputs=_batch,
        reference=_irm_reference(weight=2.0, penalty="irmv1", denominator="all"),
        made_of=_of_classes(weight=2.0),
        refused={
            "E5 indices": Refused(
                ValueError, "indices must be in 0 .. 29 .* got 30 at", replace(2, lambda i: 0 * i + 30)
            ),
            "F27 penalty": Refused(ValueError, "penalty must be one of .* got 'vrex'", options={"penalty": "vrex"}),
        },
        empty=0.0,
        one=0.0,
        processes="gather",
    ),
    Record(
        name="ClassWiseIRM/sample weights",
        make=_irm(weight=0.0, sample_weights=True),
        inputs=_batch,
        reference=_irm_reference(weighted=True, weight=0.0),
        made_of=_of_classes(weight=0.0),
        refused={
            "labels": Refused(ValueError, "labels must be those of the fitted", replace(1, lambda y: (y + 1) % 3)),
            "F27 detach": Refused(ValueError, "detach must be one of .* got 'risk'", options={"detach": "risk"}),
        },
        empty=0.0,
        one=0.0,
        processes="gather",
    ),
    Record(
        name="ClassWiseIRM/SupCon",
        make=_irm(
            contrast="batch", penalty_on="features", denominator="all", weight=2.0, risk_weight=1.4, detach=False
        ),
        inputs=_batch,
        reference=_irm_reference(on_features=True, contrast="batch", denominator="all", weight=2.0, risk_weight=1.4),
        refused={"F27 contrast": Refused(ValueError, "contrast must be one of .* got 'x'", options={"contrast": "x"})},
        empty=0.0,
        one=0.0,
        processes="gather",
    ),
    Record(
        name="ClassWiseIRM/split in the batch",
        make=_irm(weight=2.0, detach=False),
        inputs=lambda draw: _batch(draw)[:2],
        reference=_irm_reference(weight=2.0, penalty="rex", denominator="own"),
        made_of=_of_classes(weight=2.0),
        refused=_IRM_REFUSED,
        empty=0.0,
        one=0.0,
        processes="gather",
    ),
]
