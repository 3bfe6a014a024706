"""Records of the losses of Step 1 of IP-IRM."""

import torch

from equireg import IPIRMLoss, MoCoIPIRMLoss, SimSiamIPIRMLoss
from tests import loss_references
from tests.records.record import AS_REFERENCE, BATCH, Record, Refused, refused_type, replace

HOW = {"temperature": 0.3, "weight": 0.4}  # none of them the default
PARTITIONS = torch.stack([torch.zeros(30).long(), torch.arange(30) % 2, torch.arange(30) // 12])


def _moco(**options):
    """With keys of eight samples in a queue of twenty-four."""
    settings = {"num_features": 5, "queue_size": 24, **HOW, **options}
    before = MoCoIPIRMLoss(PARTITIONS, **{**settings, "gather_distributed": False, **HOW})
    generator = torch.Generator().manual_seed(3)
    before(*torch.randn(2, 8, 5, generator=generator), torch.randperm(30, generator=generator)[:8])
    loss = MoCoIPIRMLoss(PARTITIONS, **settings)
    loss.load_state_dict(before.state_dict())
    return loss


def _moco_reference(p, query, key, indices):
    return loss_references.moco_ip_irm(query, key, indices, p["queue"], p["queue_indices"], PARTITIONS[1:], **HOW)


def _of_groups(parts):
    """Two partitions of more than one group, of three groups at most; the first has two."""
    assert parts.risk.shape == parts.penalty.shape == parts.present.shape == (2, 3)
    assert not parts.present[0, 2]
    of_groups = (parts.risk + HOW["weight"] * parts.penalty)[parts.present]
    return parts.global_risk + of_groups.mean()


def _of_groups_and_all(parts):
    return _of_groups(parts) + HOW["weight"] * parts.global_penalty


def _refused(name, place):
    return {
        "F2 whole numbers": refused_type(0, name),
        "F5 dtypes": Refused(TypeError, "dtype torch.float64, got torch.float32", replace(1, lambda x: x.float())),
        "E5 indices": Refused(
            ValueError, "indices must be in 0 .. 29 .* got 30 at", replace(place, lambda i: 0 * i + 30)
        ),
        "F34 weight": Refused(ValueError, "weight must be finite and at least 0, got -1", options={"weight": -1}),
    }


def _predicted_and_projected(draw):
    learns, given = ([draw.floats(BATCH, 5, grad=grad) for _ in range(2)] for grad in (True, False))
    return *learns, *given, draw.indices(30)


RECORDS = [
    Record(
        name="IPIRMLoss",
        make=lambda **options: IPIRMLoss(PARTITIONS, **{**HOW, **options}),
        inputs=lambda draw: (draw.floats(BATCH, 5), draw.floats(BATCH, 5), draw.indices(30)),
        reference=lambda p, z1, z2, indices: loss_references.ip_irm(z1, z2, PARTITIONS[1:, indices], **HOW),
        made_of=_of_groups,
        refused=_refused("IPIRMLoss: z1", 2),
        empty=Refused(ValueError, r"z1 must be of at least one sample and one feature, got \[0, 5\]"),
        one=0.0,  # no negative
        processes="gather",
        streams=True,
    ),
    Record(
        name="IPIRMLoss/global penalty",
        make=lambda **options: IPIRMLoss(PARTITIONS, **{"global_penalty": True, **HOW, **options}),
        inputs=lambda draw: (draw.floats(BATCH, 5), draw.floats(BATCH, 5), draw.indices(30)),
        reference=lambda p, z1, z2, indices: loss_references.ip_irm(
            z1, z2, PARTITIONS[1:, indices], global_penalty=True, **HOW
        ),
        made_of=_of_groups_and_all,
        refused={"F27": Refused(ValueError, "global_penalty must be one of .* got 2", options={"global_penalty": 2})},
        empty=Refused(ValueError, r"z1 must be of at least one sample and one feature, got \[0, 5\]"),
        one=0.0,
        processes="gather",
        streams=True,
    ),
    Record(
        name="IPIRMLoss/scale of each logit",
        make=lambda **options: IPIRMLoss(PARTITIONS, **{"dummy_scales": "logits", **HOW, **options}),
        inputs=lambda draw: (draw.floats(BATCH, 5), draw.floats(BATCH, 5), draw.indices(30)),
        reference=lambda p, z1, z2, indices: loss_references.ip_irm_of_logits(z1, z2, PARTITIONS[1:, indices], **HOW),
        made_of=_of_groups,
        refused={"F27": Refused(ValueError, "dummy_scales must be one of .* got", options={"dummy_scales": "two"})},
        empty=Refused(ValueError, r"z1 must be of at least one sample and one feature, got \[0, 5\]"),
        one=0.0,
        processes="gather",
    ),
    Record(
        name="SimSiamIPIRMLoss",
        make=lambda **options: SimSiamIPIRMLoss(PARTITIONS, **{"weight": 0.4, "global_penalty": True, **options}),
        inputs=_predicted_and_projected,
        reference=lambda p, *views_and_indices: loss_references.sim_siam_ip_irm(
            *views_and_indices[:4], PARTITIONS[1:, views_and_indices[4]], 0.4, True
        ),
        made_of=_of_groups_and_all,
        refused=_refused("SimSiamIPIRMLoss: p1", 4),
        empty=Refused(ValueError, r"p1 must be of at least one sample and one feature, got \[0, 5\]"),
        one=AS_REFERENCE,
        frozen=(2, 3),
        processes="gather",
    ),
    Record(
        name="MoCoIPIRMLoss",
        make=_moco,
        inputs=lambda draw: (draw.floats(BATCH, 5), draw.floats(BATCH, 5, grad=False), draw.indices(30)),
        reference=_moco_reference,
        made_of=_of_groups,
        refused={
            **_refused("MoCoIPIRMLoss: query", 2),
            "queue": Refused(
                ValueError, r"query must be of 1 to queue_size = 8 .* got \[12, 5\]", options={"queue_size": 8}
            ),
        },
        empty=Refused(ValueError, r"query must be of 1 to queue_size = 24 samples, got \[0, 5\]"),
        one=AS_REFERENCE,
        frozen=(1,),
        processes="gather",
        streams=True,
    ),
]
