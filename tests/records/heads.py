"""Records of the heads that predict: intermediate images, and how two augmentations differ."""

from equireg import AugSelfLoss, IntermediateReconstructionHead
from tests import loss_references
from tests.records.record import AS_REFERENCE, BATCH, Record, Refused, refused_type, replace

KINDS = {"scale": "regression", "flip": "binary", "rotation": "classification"}
WIDTHS = {"scale": 2, "flip": 1, "rotation": 4}


def _head(**options):
    settings = {"image_size": 8, "patch_size": 4, "hidden_dim": 8, **options}
    return IntermediateReconstructionHead(4, **settings)


def _augself(**options):
    return AugSelfLoss(5, {name: (KINDS[name], WIDTHS[name]) for name in KINDS}, **{"hidden_dim": 6, **options})


def _differences(draw):
    scale = 2 * draw.floats(BATCH, 2, grad=False, uniform=True) - 1
    return {"scale": scale, "flip": draw.booleans(BATCH), "rotation": draw.whole(4, BATCH)}


RECORDS = [
    Record(
        name="IntermediateReconstructionHead",
        make=_head,
        inputs=lambda draw: (
            draw.floats(BATCH, 4, 2),
            draw.floats(BATCH, 4, 2),
            draw.floats(2, BATCH, 3, 8, 8, grad=False, uniform=True),
        ),
        reference=lambda p, *args: loss_references.reconstruction(p, *args, patch_size=4),
        made_of=lambda parts: parts.errors.mean(),
        refused={
            "F2 whole numbers": refused_type(0, "IntermediateReconstructionHead: equivariant1"),
            "G6 prefix tokens": Refused(
                ValueError, r"equivariant2 must be .* got \[12, 3, 2\]", replace(1, lambda x: x[:, 1:])
            ),
            "bytes": Refused(ValueError, "targets must be in 0 .. 1, .* got", replace(2, lambda x: 255 * x)),
            "patch_size": Refused(ValueError, "patch_size must be at least 1, got 0", options={"patch_size": 0}),
        },
        empty=Refused(ValueError, r"equivariant1 must be of at least one image, got \[0, 4, 2\]"),
        processes="mean",
        one=AS_REFERENCE,
    ),
    Record(
        name="AugSelfLoss",
        make=_augself,
        inputs=lambda draw: (draw.floats(BATCH, 5), draw.floats(BATCH, 3, 5), _differences(draw), _differences(draw)),
        reference=lambda p, *args: loss_references.augself(p, *args, kinds=KINDS),
        made_of=lambda parts: sum(parts.losses[name] for name in KINDS),
        refused={
            "F2 whole numbers": refused_type(1, "AugSelfLoss: features2"),
            "missing": Refused(ValueError, r"forward_targets must be with .* 'scale', got \[\]", replace(2, {})),
            "hidden_dim": Refused(ValueError, "hidden_dim must be at least 1, got 0", options={"hidden_dim": 0}),
        },
        empty=Refused(ValueError, r"features1 must be of at least one image, got \[0, 5\]"),
        processes="mean",
        one=AS_REFERENCE,
        half_module=True,
    ),
]
