import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer as TorchvisionViT

from equireg import LateClassToken
from tests.backbones.conftest import hooks, in_two_threads

timm = pytest.importorskip("timm", reason="needs the examples extra")

# Models of one kind each: the keyword arguments make them small, not other.
SMALL = {"embed_dim": 48, "depth": 4, "num_heads": 4, "num_classes": 5}
SUPPORTED = {
    "vit_tiny_patch16_224": {"img_size": 64},
    "deit_tiny_patch16_224": {"img_size": 64},
    "deit_tiny_distilled_patch16_224": {"img_size": 64},
    "deit3_small_patch16_224": {"img_size": 64},  # no position for the class token
    "flexivit_small": {"img_size": 64},
    "vit_base_patch16_clip_224": {"img_size": 64},  # norm before the blocks
    "vit_small_patch14_dinov2": {"img_size": 56},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56},  # registers
    "vit_small_patch16_dinov3": {"img_size": 64},  # registers and rotary embedding
    "vit_small_patch16_rope_224": {"img_size": 64},
    "vit_small_patch16_rope_mixed_224": {"img_size": 64},  # rotary frequencies of each block
    "vit_small_patch16_rope_ape_224": {"img_size": 64},
    "eva02_tiny_patch14_224": {"img_size": 56},
    "vit_base_patch32_plus_256": {"img_size": 64},
    "test_vit": {"img_size": 64},
}
REFUSED = {
    "vit_medium_patch16_gap_240": "there is nothing to insert",
    "vit_base_patch16_siglip_224": "there is nothing to insert",
    "vit_wee_patch16_reg1_gap_256": "there is nothing to insert",
    "cait_xxs24_224": r"first block sees \[B, 1 \+ 196, D\]",
    "xcit_nano_12_p16_224": r"first block sees \[B, 1 \+ 196, D\]",
    "convit_tiny": r"first block sees \[B, 1 \+ 196, D\]",
    "beit_base_patch16_224": "without relative position bias",
    "vit_relpos_medium_patch16_cls_224": "without relative position bias",
    "swin_tiny_patch4_window7_224": "a ViT of timm or torchvision",
    "resnet18": "a ViT of timm or torchvision",
}


def create(name, **options):
    torch.manual_seed(0)
    small = SMALL if name.startswith(("vit_", "deit", "flexivit", "eva02", "beit")) else {"num_classes": 5}
    model = timm.create_model(name, **{**SUPPORTED.get(name, {}), **small, **options})
    for parameter in model.parameters():  # zero initialisations and tiny layer scales would hide mistakes
        if parameter.std() < 1e-3:
            nn.init.normal_(parameter, 0.5, 0.2)
    return model.eval()


def vit(**options):
    return create("vit_tiny_patch16_224", **options)


def torchvision_vit():
    torch.manual_seed(0)
    model = TorchvisionViT(32, 8, num_layers=4, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5).eval()
    nn.init.normal_(model.heads.head.weight)
    return model


def images(model, count=2):
    size = getattr(model, "image_size", None) or model.patch_embed.img_size[0]
    return torch.rand(count, 3, size, size)


def blocks_of(model):
    return model.encoder.layers if isinstance(model, TorchvisionViT) else model.blocks


def entering(model, x):
    """What each block is given when the model runs, as [B, tokens, D] and keyword arguments."""
    seen = []
    handles = [
        block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
        for block in blocks_of(model)
    ]
    result = model(x)
    for handle in handles:
        handle.remove()
    return result, seen


def by_hand(model, x, layer, prefix):
    """The model with the first blocks on patch tokens alone, written out; ``model`` is not wrapped."""
    _, seen = entering(model, x)
    tokens = seen[0][0][0]
    head, patches = tokens[:, :prefix], tokens[:, prefix:]
    for block, (args, given) in zip(list(blocks_of(model))[:layer], seen):
        rotary = [m for m in block.modules() if hasattr(m, "num_prefix_tokens")]
        for module in rotary:
            module.num_prefix_tokens = 0
        patches = block(patches, *args[1:], **given)
        for module in rotary:
            module.num_prefix_tokens = prefix
    late = torch.cat([head, patches], 1)
    # The rest of the model, from block ``layer`` on.
    handle = blocks_of(model)[layer].register_forward_pre_hook(lambda _, args: (late, *args[1:]))
    result = model(x)
    handle.remove()
    return result, patches


@pytest.mark.parametrize("name", [*SUPPORTED, "torchvision"])
@torch.no_grad()
def test_supported_architectures(name):
    model = torchvision_vit() if name == "torchvision" else create(name)
    x, prefix, keys = images(model), getattr(model, "num_prefix_tokens", 1), list(model.state_dict())
    plain = model(x)
    expected, tokens = by_hand(model, x, 2, prefix)
    assert (expected - plain).abs().max() > 1e-5  # inserting late does make a difference

    unchanged = LateClassToken(copy.deepcopy(model), 0)
    assert torch.equal(unchanged(x), plain)
    features, first = unchanged(x, return_tokens=True)
    assert torch.equal(features, plain)
    assert torch.equal(first, entering(model, x)[1][0][0][0][:, prefix:])

    late = LateClassToken(model, 2)
    features, found = late(x, return_tokens=True)
    assert torch.equal(features, expected)
    assert torch.equal(found, tokens)
    assert torch.equal(late(x), expected)
    assert torch.equal(model(x), expected)  # in place
    assert list(model.state_dict()) == keys
    seen = [args[0].shape[1] for args, _ in entering(model, x)[1]]
    assert seen == [found.shape[1]] * 2 + [prefix + found.shape[1]] * (len(blocks_of(model)) - 2)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_architectures(name):
    model = create(name)
    before = hooks(model)
    with pytest.raises(ValueError, match=f"^LateClassToken: vit must be .*{REFUSED[name]}.*TokenTap"):
        LateClassToken(model, 1)
    assert hooks(model) == before


def test_tokens_know_nothing_of_the_class_token():
    model = LateClassToken(vit(), 3)
    features, tokens = model(images(model.vit), return_tokens=True)
    assert not torch.autograd.grad(tokens.sum(), model.vit.cls_token, retain_graph=True)[0].any()
    assert torch.autograd.grad(features.sum(), model.vit.cls_token)[0].norm() > 0


@pytest.mark.parametrize("size", [(96, 96), (64, 128), (48, 32)])
@torch.no_grad()
def test_dynamic_sizes(size):  # W9
    model = vit(dynamic_img_size=True)
    x = torch.rand(2, 3, *size)
    expected, tokens = by_hand(model, x, 2, 1)
    features, found = LateClassToken(model, 2)(x, return_tokens=True)
    assert torch.equal(features, expected)
    assert found.shape[1] == size[0] * size[1] // 256
    assert torch.equal(found, tokens)
    assert LateClassToken(vit(), 2)(torch.rand(0, 3, 64, 64), return_tokens=True)[1].shape == (0, 16, 48)


@pytest.mark.parametrize("nested", [False, True])
def test_state_dicts_load_both_ways(nested):  # W6
    def model(encoder):
        return nn.ModuleDict({"encoder": encoder, "head": nn.Linear(5, 2)}) if nested else encoder

    plain, late, other = model(vit()), model(LateClassToken(vit(), 2)), model(LateClassToken(vit(), 3))
    assert list(late.state_dict()) == list(plain.state_dict())
    for parameter in late.parameters():
        nn.init.normal_(parameter)
    plain.load_state_dict(late.state_dict())
    other.load_state_dict(plain.state_dict())
    for found in (plain, other):
        torch.testing.assert_close(found.state_dict(), late.state_dict(), rtol=0, atol=0)
    missing = {key: value for key, value in plain.state_dict().items() if "cls_token" not in key}
    with pytest.raises(RuntimeError, match=r'Missing key.*vit.cls_token"'):
        late.load_state_dict(missing)


@pytest.mark.parametrize("make", [vit, torchvision_vit, lambda: create("eva02_tiny_patch14_224")])
@torch.no_grad()
def test_copies_are_their_own(make):  # W3, P10
    late = LateClassToken(make(), 2)
    x = images(late.vit)
    expected = late(x, return_tokens=True)
    buffer = io.BytesIO()
    torch.save(late, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(late), pickle.loads(pickle.dumps(late)), torch.load(buffer, weights_only=False)):  # noqa: S301
        torch.testing.assert_close(other(x, return_tokens=True), expected, rtol=0, atol=0)
        for parameter in other.parameters():
            parameter.zero_()
    torch.testing.assert_close(late(x, return_tokens=True), expected, rtol=0, atol=0)


def backward(late, call, x):
    """Features and tokens, and the gradients of both."""
    late.zero_grad()
    features, tokens = call(x, return_tokens=True)
    (features.square().sum() + tokens.square().sum()).backward()
    assert not late._keep.kept
    return features, tokens, [p.grad for p in late.parameters() if p.grad is not None]


@pytest.mark.parametrize("make", [vit, torchvision_vit, lambda: create("vit_small_patch16_dinov3")])
def test_compiles_whole(make):  # W4
    model = make()
    del blocks_of(model)[3:]  # three are as good as twelve
    late = LateClassToken(model, 2)
    x = images(model)
    compiled = torch.compile(late, fullgraph=True, backend="aot_eager")
    found, expected = backward(late, compiled, x), backward(late, late, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled(x), late(x))


def test_activation_checkpointing():  # W5
    late = LateClassToken(vit(), 2).train()
    x, expected = images(late.vit), None
    for checkpointed in (False, True):
        late.vit.set_grad_checkpointing(checkpointed)
        found = backward(late, late, x)
        expected = expected or found
        torch.testing.assert_close(found, expected)
    # Recomputing stops in the midst of a block. Nothing is left of it, so the model can still be copied.
    assert all(not hook.held for block in late.vit.blocks[:2] for hook in block._forward_pre_hooks.values())
    assert torch.equal(copy.deepcopy(late).eval()(x), late.eval()(x))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused():  # W8
    class Reentrant(nn.Sequential):  # runs blocks as an older checkpoint does
        def forward(self, x):
            for block in self:
                x = checkpoint(block, x, use_reentrant=True)
            return x

    model = vit()
    model.blocks = Reentrant(*model.blocks)
    late = LateClassToken(model, 2)
    with pytest.raises(ValueError, match="use_reentrant=False, got tokens without gradient"):
        late(images(late.vit), return_tokens=True)
    frozen = late.requires_grad_(False)
    frozen.vit.blocks[3].requires_grad_(True)
    assert not frozen(images(late.vit), return_tokens=True)[1].requires_grad  # a frozen start is nobody's mistake


@torch.no_grad()
def test_two_threads_do_not_mix():  # W7
    late = LateClassToken(vit(), 2)

    def work(pair):
        found = late(pair[0], return_tokens=True)
        return all(torch.allclose(a, b) for a, b in zip(found, pair[1]))

    inputs = torch.rand(2, 2, 3, 64, 64)
    assert in_two_threads(work, [(x, late(x, return_tokens=True)) for x in inputs])


def test_an_error_inside_leaves_nothing_behind():
    late = LateClassToken(vit(), 2)
    x = images(late.vit)
    expected = late(x)
    handle = late.vit.blocks[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        late(x, return_tokens=True)
    handle.remove()
    assert not late._keep.kept
    assert torch.equal(late(x), expected)
    assert all(not hook.held for block in late.vit.blocks[:2] for hook in block._forward_pre_hooks.values())


def test_wrapping_leaves_the_model_as_it_was():
    model = vit(drop_rate=0.5, pos_drop_rate=0.5).train()
    model.blocks[1].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    LateClassToken(model, 2)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def wrapped():
    return LateClassToken(vit(), 0).vit


def compiled_in_place():
    model = vit()
    model.compile()
    return model


@pytest.mark.parametrize(
    ("make", "layer", "message"),
    [
        (vit, 4, r"layer must be in 0 .. 3 for 4 blocks, got 4"),  # W1
        (vit, -1, "layer must be at least 0, got -1"),
        (vit, "blocks.2", "layer must be a whole number, got str 'blocks.2'"),
        (lambda: "vit_tiny", 2, "vit must be a torch.nn.Module, got str"),
        (wrapped, 2, "vit must be a model that is not wrapped already"),  # W4
        (lambda: torch.compile(vit()), 2, "vit must be wrapped first and compiled after"),
        (compiled_in_place, 2, "vit must be wrapped first and compiled after"),
        (lambda: vit(patch_drop_rate=0.3), 2, "vit must be a ViT that keeps all its patches"),
    ],
)
def test_wrong_arguments(make, layer, message):
    with pytest.raises((TypeError, ValueError), match=f"^LateClassToken: {message}"):
        LateClassToken(make(), layer)


VIEWS = [torch.rand(2, 3, 32, 32)] * 2 + [torch.rand(2, 3, 16, 16)] * 6  # as DINO's multi-crop makes them
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 4}


def test_views_of_several_sizes_are_refused_with_the_cure():
    rule = r"LateClassToken: images must be one batch \[B, C, H, W\]; call the model once for each size"
    fixed, dynamic = (timm.create_model("vit_tiny_patch16_224", dynamic_img_size=d, **TINY) for d in (False, True))
    torchvision_vit = TorchvisionViT(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32)
    for vit in (fixed, dynamic, torchvision_vit):
        with pytest.raises(TypeError, match=rf"{rule}.*got a list of 8 batches, of 16 x 16, 32 x 32"):
            LateClassToken(vit, 1)(VIEWS, return_tokens=True)
    # Unmodified models would fail by assertions of their own, which name no cure.
    again = timm.create_model("vit_tiny_patch16_224", **TINY)
    with pytest.raises(ValueError, match=r"\[B, C, 32, 32\] \(create the model with dynamic_img_size=True\), got .*16"):
        LateClassToken(again, 1)(VIEWS[-1])
