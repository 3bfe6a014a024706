"""Records of the other methods that the papers compare with: E-SSL, STL, SIE and cross-attention reconstruction."""

from equireg import CrossAttentionReconstruction, ESSLLoss, SIELoss, STLLoss
from tests import loss_references
from tests.records.record import AS_REFERENCE, BATCH, Record, Refused, refused_type, replace

SIE_WEIGHTS = (10.0, 4.5, 10.0, 1.0)


def _cross_attention(**options):
    settings = {"image_size": (4, 8), "patch_size": 2, "num_heads": 2, "hidden_dim": 7, **options}
    return CrossAttentionReconstruction(6, **settings)


def _weighted(parts):
    terms = (parts.invariance, parts.equivariance, parts.variance + parts.predictor_variance, parts.covariance)
    return sum(weight * term for weight, term in zip(SIE_WEIGHTS, terms))


RECORDS = [
    Record(
        name="ESSLLoss",
        make=lambda **options: ESSLLoss(5, **{"hidden_dim": 6, **options}),
        inputs=lambda draw: (draw.floats(BATCH, 3, 5), draw.whole(4, BATCH)),
        reference=loss_references.essl,
        made_of=lambda parts: parts.losses.mean(),
        refused={
            "F2 whole numbers": refused_type(0, "ESSLLoss: features"),
            "turns": Refused(
                ValueError, r"quarter_turns must be in 0 .. 3 \(quarter turns\), got 4", replace(1, lambda k: 0 * k + 4)
            ),
            "hidden_dim": Refused(ValueError, "hidden_dim must be at least 1, got 0", options={"hidden_dim": 0}),
        },
        empty=Refused(ValueError, r"features must be of at least one image, got \[0, 3, 5\]"),
        processes="mean",
        one=AS_REFERENCE,
        half_module=True,
    ),
    Record(
        name="STLLoss",
        make=lambda **options: STLLoss(5, **{"transformation_dim": 4, "projection_dim": 3, **options}),
        inputs=lambda draw: (
            draw.floats(BATCH, 3, 5),
            draw.floats(BATCH, 4, 5),
            draw.floats(BATCH, 3, 5),
            draw.floats(BATCH, 4, 5),
        ),
        reference=lambda p, *args: loss_references.stl(p, *args, temperature=0.2, weight=0.1),
        made_of=lambda parts: parts.equivariance + 0.1 * parts.transformation,
        refused={
            "F2 whole numbers": refused_type(2, "STLLoss: others"),
            "F4 rows": Refused(ValueError, r"others_transformed must be .* got \[11,", replace(3, lambda x: x[1:])),
            "F12 temperature": Refused(ValueError, "temperature must be .* got 0", options={"temperature": 0}),
            "F34 weight": Refused(
                ValueError, "transformation_weight must be .* got -1", options={"transformation_weight": -1}
            ),
        },
        empty=Refused(ValueError, r"features must be of at least 2 rows: .*, got \[0, 3, 5\]"),
        one=Refused(ValueError, r"features must be of at least 2 rows: .*, got \[1, 3, 5\]"),
        half_module=True,
        streams=True,
    ),
    Record(
        name="SIELoss",
        make=lambda **options: SIELoss(5, 2, **{"projection_dim": 3, **options}),
        inputs=lambda draw: (draw.floats(BATCH, 3, 5), draw.floats(BATCH, 4, 5), draw.floats(BATCH, 2)),
        reference=lambda p, *args: loss_references.sie(p, *args, weights=SIE_WEIGHTS),
        made_of=_weighted,
        refused={
            "F2 whole numbers": refused_type(2, "SIELoss: parameters"),
            "F3 width": Refused(ValueError, r"features must be .* got \[12, 3, 4\]", replace(0, lambda x: x[..., 1:])),
            "F34 weight": Refused(ValueError, "variance_weight must be .* got -1", options={"variance_weight": -1}),
        },
        empty=Refused(ValueError, r"features must be of at least 2 images: .*, got \[0, 3, 5\]"),
        one=Refused(ValueError, r"features must be of at least 2 images: .*, got \[1, 3, 5\]"),
        half_module=True,
    ),
    Record(
        name="CrossAttentionReconstruction",
        make=_cross_attention,
        inputs=lambda draw: (
            draw.floats(BATCH, 8, 6),
            draw.floats(BATCH, 5, 6),
            draw.floats(BATCH, 3, 4, 8, grad=False, uniform=True),
        ),
        reference=lambda p, *args: loss_references.cross_attention(p, *args, patch_size=2, heads=2),
        made_of=lambda parts: parts.errors.mean(),
        refused={
            "F2 whole numbers": refused_type(0, "CrossAttentionReconstruction: tokens1"),
            "G6 prefix tokens": Refused(
                ValueError, r"tokens1 must be of 2 x 4 tokens, .* got \[12, 7, 6\]", replace(0, lambda x: x[:, 1:])
            ),
            "patches": Refused(ValueError, "image_size must be whole patches", options={"image_size": 7}),
            "heads": Refused(ValueError, "num_heads must be a divisor of dim = 6, got 4", options={"num_heads": 4}),
        },
        empty=Refused(ValueError, r"tokens1 must be of at least one image, got \[0, 8, 6\]"),
        processes="mean",
        one=AS_REFERENCE,
        half_module=True,
    ),
]
