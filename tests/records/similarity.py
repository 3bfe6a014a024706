"""Records of the losses that are sums over pairs: the ground floor, soft InfoNCE, SER and EquiMod."""

import torch

from equireg import EquiModLoss, SERLoss, pair_lse, patch_nt_xent, soft_info_nce
from tests import loss_references, references
from tests.records.record import AS_REFERENCE, BATCH, NO_ENTRIES, Record, Refused, refused_type, replace


def _pairs(**options):
    return lambda x, y, scale, weight: pair_lse(x, y, scale, col_weight=weight, **options)


def _pairs_of_groups(**options):
    def call(x, y, scale, weight, select, row_group, col_group, ids):
        groups = {"relation": "ne", "row_group": row_group, "col_group": col_group, **options}
        return pair_lse(x, y, scale, col_weight=weight, row_select=select, row_id=ids, col_id=ids, **groups)

    return call


def _pairs_reference(p, x, y, scale, weight):
    keep = [[True] * len(y)] * len(x)
    return references.pair_lse(x, y, scale, keep, [[row] * len(x) for row in weight])


def _pairs_of_groups_reference(p, x, y, scale, weight, select, row_group, col_group, ids):
    keep = [[row_group[i] != col_group[j] and ids[i] != ids[j] for j in range(len(y))] for i in range(len(x))]
    return references.pair_lse(x, y, scale, keep, [[table[int(s)] for s in select] for table in weight])


def _soft_info_nce(**options):
    return lambda z1, z2, weights: soft_info_nce(z1, z2, weights, **{"temperature": 0.3, **options})


def _soft_info_nce_reference(p, z1, z2, weights):
    loss = references.soft_info_nce(z1, z2, weights, 0.3)
    slope = references.slope(references.soft_info_nce, z1, z2, weights, 0.3)
    return tuple(
        torch.stack([value if value is not None else z1.sum() * 0 for value in part]) for part in (loss, slope)
    )


def _tokens(draw):
    """Two token maps, and a temperature that learns (F14)."""
    temperature = torch.tensor(0.3, dtype=draw.dtype, requires_grad=True)
    return draw.floats(BATCH, 4, 5), draw.floats(BATCH, 4, 5), temperature


def _patch_nt_xent(**options):
    return lambda z, z_prime, temperature: patch_nt_xent(z, z_prime, **{"temperature": temperature, **options})


def _maps(draw):
    """Token maps of two views, and the elements of both."""
    tokens = draw.floats(BATCH, 9, 5), draw.floats(BATCH, 4, 5)
    return *tokens, draw.elements((2, 2), (3, 3)), draw.elements((2, 2), (2, 2))


TWO_IMAGES = "must be of at least 2 images: negatives come from other"


def _ser_of_layers(p, maps1, maps2, g1, g2):
    """The mean over layers, each with a projection of its own."""
    losses = []
    for i, pair in enumerate(zip(maps1, maps2)):
        own = {name.removeprefix(f"layers.{i}."): value for name, value in p.items() if name.startswith(f"layers.{i}.")}
        losses.append(loss_references.ser(own, *pair, g1, g2, temperature=0.5))
    return sum(losses) / len(losses)


OF_LAYERS = {"projection_dim": 6, "layers": 2, "temperature": 0.5}
RECORDS = [
    Record(
        name="pair_lse",
        make=_pairs,
        inputs=lambda draw: (
            draw.floats(BATCH, 5),
            draw.floats(BATCH, 5),
            draw.floats(uniform=True),
            draw.floats(2, BATCH, uniform=True),
        ),
        reference=_pairs_reference,
        refused={
            "F2 whole numbers": refused_type(0, "pair_lse: x"),
            "F3 a row": Refused(ValueError, r"pair_lse: x must be \[M, D\], got \[12\]", replace(0, torch.ones(12))),
            "F5 dtypes": Refused(
                TypeError, "y must be of x's dtype .* got torch.float32", replace(1, lambda y: y.float())
            ),
            "F27 relation": Refused(ValueError, "relation must be one of .* got 'neq'", options={"relation": "neq"}),
        },
        empty=NO_ENTRIES,
        one=AS_REFERENCE,
        streams=True,
    ),
    Record(
        name="pair_lse/groups",
        make=_pairs_of_groups,
        inputs=lambda draw: (
            draw.floats(BATCH, 5),
            draw.floats(BATCH, 5),
            draw.floats(uniform=True),
            draw.floats(2, 4, BATCH, uniform=True),
            draw.whole(4, BATCH),
            draw.labels(3),
            draw.labels(3),
            torch.arange(BATCH),
        ),
        reference=_pairs_of_groups_reference,
        refused={
            "float groups": Refused(
                TypeError,
                "row_group must be a tensor of whole numbers, got torch.float64",
                replace(5, lambda x: x.double()),
            ),
            "selection": Refused(
                ValueError, "row_select must be in 0 .. 3 .*, got 4 at position 0", replace(4, lambda x: x * 0 + 4)
            ),
        },
        empty=NO_ENTRIES,
        one=(-torch.inf, 0.0),  # no pair is kept
        streams=True,
    ),
    Record(
        name="soft_info_nce",
        make=_soft_info_nce,
        inputs=lambda draw: (draw.floats(BATCH, 5), draw.floats(BATCH, 5), draw.floats(BATCH, 2, uniform=True)),
        reference=_soft_info_nce_reference,
        refused={
            "F4 samples": Refused(
                ValueError, r"z2 must be \[N, d\] = \[12, 5\], got \[11, 5\]", replace(1, lambda z: z[1:])
            ),
            "E4 weights": Refused(ValueError, "weights must be finite and at least 0, got -", replace(2, lambda w: -w)),
            "F12 temperature": Refused(ValueError, "temperature must be .* above 0, got 0", options={"temperature": 0}),
        },
        empty=Refused(ValueError, r"z1 must be of at least one sample and one feature, got \[0, 5\]"),
        one=(0.0, 0.0),  # no row has a negative
        processes="gather",
        streams=True,
    ),
    Record(
        name="patch_nt_xent",
        make=_patch_nt_xent,
        inputs=_tokens,
        reference=lambda p, z, z_prime, temperature: references.patch_nt_xent(z, z_prime, temperature),
        refused={
            "F2 whole numbers": refused_type(0, "patch_nt_xent: z"),
            "F4 places": Refused(
                ValueError,
                r"patch_nt_xent: z_prime must be .* = \[12, 4, 5\], got \[12, 3, 5\]",
                replace(1, lambda z: z[:, 1:]),
            ),
            "F12 temperature": Refused(ValueError, "temperature must be .* got -1.0", options={"temperature": -1.0}),
        },
        empty=Refused(ValueError, rf"z {TWO_IMAGES} images, got \[0, 4, 5\]"),
        one=Refused(ValueError, rf"z {TWO_IMAGES} images, got \[1, 4, 5\]"),
        streams=True,
    ),
    Record(
        name="SERLoss",
        make=lambda **options: SERLoss(5, **{"projection_dim": 6, **options}),
        inputs=_maps,
        reference=lambda p, *args: loss_references.ser(p, *args, temperature=0.3),
        made_of=lambda parts: parts.log_denominator - parts.alignment / 0.3,
        refused={
            "G6 prefix tokens": Refused(
                ValueError,
                r"SERLoss: tokens1 must be of 3 x 3 tokens, .* got \[12, 10, 5\]",
                replace(0, torch.ones(12, 10, 5)),
            ),
            "G2 no element": Refused(TypeError, "g2 must be a GridTransform, got str", replace(3, "rot90")),
            "F12 temperature": Refused(ValueError, "temperature must be .* got -1.0", options={"temperature": -1.0}),
        },
        empty=Refused(ValueError, rf"tokens1 {TWO_IMAGES}s, got \[0, 9, 5\]"),
        one=Refused(ValueError, rf"tokens1 {TWO_IMAGES}s, got \[1, 9, 5\]"),
        processes="gather",
        half_module=True,
        streams=True,
    ),
    Record(
        name="SERLoss/moved",
        make=lambda **options: SERLoss(5, **{"projection_dim": 6, "negatives": "moved", **options}),
        inputs=_maps,
        reference=lambda p, *args: loss_references.ser(p, *args, temperature=0.3, negatives="moved"),
        made_of=lambda parts: parts.log_denominator - parts.alignment / 0.3,
        refused={
            "negatives": Refused(
                ValueError, "negatives must be one of 'both', 'moved', got 'other'", options={"negatives": "other"}
            ),
        },
        empty=Refused(ValueError, rf"tokens1 {TWO_IMAGES}s, got \[0, 9, 5\]"),
        one=Refused(ValueError, rf"tokens1 {TWO_IMAGES}s, got \[1, 9, 5\]"),
        processes="gather",
        half_module=True,
        streams=True,
    ),
    Record(
        name="SERLoss/layers",
        make=lambda **options: SERLoss(5, **{**OF_LAYERS, **options}),
        inputs=lambda draw: (
            [draw.floats(BATCH, 9, 5), draw.floats(BATCH, 9, 5)],
            [draw.floats(BATCH, 4, 5), draw.floats(BATCH, 4, 5)],
            draw.elements((2, 2), (3, 3)),
            draw.elements((2, 2), (2, 2)),
        ),
        reference=_ser_of_layers,
        made_of=lambda parts: parts.log_denominator - parts.alignment / 0.5,
        refused={
            "one map": Refused(
                ValueError, "tokens1 must be a list of 2 maps, .* got Tensor", replace(0, lambda x: x[0])
            ),
            "layers": Refused(ValueError, "layers must be at least 1, got 0", options={"layers": 0}),
        },
        empty=Refused(ValueError, rf"tokens1 {TWO_IMAGES}s, got \[0, 9, 5\]"),
        one=Refused(ValueError, rf"tokens1 {TWO_IMAGES}s, got \[1, 9, 5\]"),
        processes="gather",
        half_module=True,
        streams=True,
    ),
    Record(
        name="EquiModLoss",
        make=lambda **options: EquiModLoss(
            5, 2, **{"projection_dim": 6, "parameter_dim": 4, "temperature": 0.4, **options}
        ),
        inputs=lambda draw: (draw.floats(BATCH, 3, 5), draw.floats(BATCH, 4, 5), draw.floats(BATCH, 2)),
        reference=lambda p, *args: loss_references.equimod(p, *args, temperature=0.4),
        made_of=lambda parts: parts.log_denominator - parts.alignment / 0.4,
        refused={
            "F2 whole numbers": refused_type(2, "EquiModLoss: parameters"),
            "F3 width": Refused(ValueError, r"features must be .* got \[12, 3, 4\]", replace(0, lambda x: x[..., 1:])),
            "F12 temperature": Refused(ValueError, "temperature must be .* got 0", options={"temperature": 0}),
        },
        empty=Refused(ValueError, rf"features {TWO_IMAGES} images, got \[0, 3, 5\]"),
        one=Refused(ValueError, rf"features {TWO_IMAGES} images, got \[1, 3, 5\]"),
        half_module=True,
        streams=True,
    ),
]
