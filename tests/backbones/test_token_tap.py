import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from equireg import LateClassToken, TokenTap
from tests.backbones.conftest import hooks, in_two_threads

timm = pytest.importorskip("timm", reason="needs the examples extra")

# Model, layer, which of forward_intermediates' maps that is, and images: square, and where the model can, not.
MAPS = [
    ("vit_tiny_patch16_224", "blocks.2", 2, {"dynamic_img_size": True, "embed_dim": 48, "num_heads": 4}, (64, 96)),
    ("deit_tiny_distilled_patch16_224", "blocks.2", 2, {"embed_dim": 48, "num_heads": 4}, (224, 224)),
    ("vit_small_patch14_reg4_dinov2", "blocks.1", 1, {"img_size": 56, "embed_dim": 48}, (56, 56)),
    ("vit_small_patch16_dinov3", "blocks.1", 1, {"dynamic_img_size": True, "embed_dim": 48}, (64, 128)),
    ("eva02_tiny_patch14_224", "blocks.1", 1, {"img_size": 56, "embed_dim": 48, "num_heads": 4}, (56, 56)),
    ("beit_base_patch16_224", "blocks.1", 1, {"img_size": 64, "embed_dim": 48, "depth": 3}, (64, 64)),
    ("vit_wee_patch16_reg1_gap_256", "blocks.2", 2, {"embed_dim": 48, "num_heads": 4, "img_size": 64}, (64, 64)),
    ("cait_xxs24_224", "blocks.1", 1, {"depth": 3}, (224, 224)),
    ("xcit_nano_12_p16_224", "blocks.1", 1, {}, (224, 224)),
    ("swin_tiny_patch4_window7_224", "layers.1", 1, {"img_size": (64, 128), "window_size": 4}, (64, 128)),
    ("swinv2_tiny_window8_256", "layers.0", 0, {"img_size": 96, "window_size": 4}, (96, 96)),
    (
        "swin_tiny_patch4_window7_224",
        "layers.0",
        0,
        {"img_size": 96, "embed_dim": 24, "window_size": 4},
        (96, 96),
    ),  # 24³
    ("convnext_atto", "stages.1", 1, {}, (64, 96)),
    ("resnet18", "layer2", 2, {}, (64, 96)),
    ("efficientnet_b0", "blocks.2", None, {}, (64, 96)),
    ("regnety_002", "s2", 2, {}, (64, 96)),
    ("maxvit_rmlp_pico_rw_256", "stages.1", 2, {"img_size": 64}, (64, 64)),
    ("pvt_v2_b0", "stages.1", 1, {}, (64, 96)),
]


def vit(**options):
    small = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 4, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", **{**small, **options}).eval()


@pytest.mark.parametrize(("name", "layer", "index", "options", "size"), MAPS, ids=[f"{m[0]}-{m[4]}" for m in MAPS])
@torch.no_grad()
def test_tokens_and_grid(name, layer, index, options, size):
    model = timm.create_model(name, num_classes=4, **options).eval()
    x, seen = torch.rand(2, 3, *size), []
    expected = model(x)
    with TokenTap(model, layer) as tap:
        assert torch.equal(model(x), expected)
    assert not hooks(model)
    if index is None:
        model.get_submodule(layer).register_forward_hook(lambda *args: seen.append(args[2]))
        model(x)
    else:
        seen = model.forward_intermediates(x, indices=[index], output_fmt="NCHW", intermediates_only=True)
    assert tap.grid == tuple(seen[0].shape[2:])
    assert torch.equal(tap.tokens, seen[0].flatten(2).transpose(1, 2))


@torch.no_grad()
def test_torchvision():
    models = torchvision.models
    vit = models.VisionTransformer(32, 8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32)
    swin = models.swin_transformer.SwinTransformer([4, 4], 24, [1, 1], [2, 2], [4, 4])
    for model, layer, size, grid, width in (
        (vit, "encoder.layers.encoder_layer_1", (32, 32), (4, 4), 16),
        (swin, "features.1", (64, 96), (16, 24), 24),
        (models.resnet18(), "layer3", (64, 96), (4, 6), 256),
    ):
        with TokenTap(model.eval(), layer) as tap:
            model(torch.rand(2, 3, *size))
        assert tap.grid == grid
        assert tap.tokens.shape == (2, grid[0] * grid[1], width)
    # Row by row of the grid: what a bright patch changes stands at its place.
    tap = TokenTap(swin, "features.0")
    x = torch.zeros(1, 3, 64, 96)
    x[:, :, 8:12, 20:24] = 1
    with tap:
        swin(x)
    assert (tap.tokens - tap.tokens[:, :1]).abs().sum(-1).argmax() == 2 * 24 + 5


def test_grid_follows_every_forward_pass():  # W9
    model = vit(dynamic_img_size=True)
    with TokenTap(model, "blocks.1") as tap:
        for size, grid in (((64, 64), (4, 4)), ((32, 96), (2, 6)), ((96, 48), (6, 3))):
            model(torch.rand(1, 3, *size))
            assert tap.grid == grid
            assert tap.tokens.shape == (1, grid[0] * grid[1], 48)
        model.forward_features(torch.rand(1, 3, 64, 64))
        # Images are not seen where the model's own hooks do not run: square grids only.
        assert tap.grid == (4, 4)
        with pytest.raises(ValueError, match=r"map of tokens.*got \[1, 19, 48\] for unknown images"):
            model.forward_features(torch.rand(1, 3, 48, 96))
    model = vit()
    with TokenTap(model, "blocks.1") as tap:
        model(torch.rand(0, 3, 64, 64))
        assert tap.tokens.shape == (0, 16, 48)


def test_nothing_is_left_behind():  # W3
    model = vit()
    handle = model.blocks[1].register_forward_hook(lambda *_: 1 / 0)
    tap = TokenTap(model, "blocks.1")
    assert hooks(model) == 1
    with pytest.raises(ZeroDivisionError), tap:
        model(torch.rand(1, 3, 64, 64))
    assert hooks(model) == 1
    handle.remove()
    for _ in range(3):  # entered again and again
        with tap:
            model(torch.rand(1, 3, 64, 64))
        assert not hooks(model)
        assert tap.grid == (4, 4)
    with TokenTap(model, "blocks.1") as outer, TokenTap(model, "blocks.2") as inner:
        model(torch.rand(1, 3, 64, 64))
    assert not torch.equal(outer.tokens, inner.tokens)
    tap.__enter__()
    other = copy.deepcopy(model)
    tap.close()
    assert not hooks(model)
    other(torch.rand(1, 3, 64, 64))  # a copy made inside of the context runs, with hooks of its own


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_flow_through_tokens(checkpointed):  # W5: recorded once
    model = vit().train()
    model.set_grad_checkpointing(checkpointed)
    with TokenTap(model, "blocks.1") as tap:
        logits = model(torch.rand(2, 3, 64, 64))
        before = tap.tokens
        (0 * logits.sum() + before.square().sum()).backward()
        assert tap.tokens is before
    assert model.patch_embed.proj.weight.grad.norm() > 0
    assert not model.blocks[2].mlp.fc1.weight.grad.any()


class Checkpointed(nn.Sequential):
    """Blocks that run as an older checkpoint runs them: each alone, or in two segments."""

    in_segments = False

    def forward(self, x):
        if self.in_segments:
            return checkpoint_sequential(self, 2, x, use_reentrant=True)
        for block in self:
            x = checkpoint(block, x, use_reentrant=True)
        return x


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_hides_no_gradient():  # W8
    model, x = vit().train(), torch.rand(2, 3, 64, 64)
    found = []
    for blocks in (model.blocks, Checkpointed(*model.blocks)):
        model.blocks = blocks
        with TokenTap(model, "blocks.1") as tap:
            model(x)
            model.zero_grad()
            tap.tokens.square().sum().backward()
        found.append([model.patch_embed.proj.weight.grad.clone(), model.blocks[1].mlp.fc1.weight.grad.clone()])
    torch.testing.assert_close(*found)
    model.blocks.in_segments = True
    with TokenTap(model, "blocks.0.mlp.drop1") as tap:  # without parameters
        model(x)
        with pytest.raises(ValueError, match="checkpoint with use_reentrant=False, got tokens without gradient"):
            tap.tokens  # noqa: B018
    with TokenTap(model, "blocks.0") as tap:  # in the midst of a segment
        model(x)
        assert tap.grid == (4, 4)
        with pytest.raises(ValueError, match="checkpoint with use_reentrant=False, got tokens without gradient"):
            tap.tokens  # noqa: B018
        with torch.no_grad():
            model(x)
        assert tap.tokens.shape == (2, 16, 48)  # nothing was to be learned
        model.blocks[0].requires_grad_(False)
        model(x)
        assert not tap.tokens.requires_grad  # a frozen start is nobody's mistake


def test_a_part_that_the_model_runs_without_gradient():
    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit, self.head = vit(), nn.Linear(4, 2)

        def forward(self, x):
            with torch.no_grad():
                features = self.vit(x)
            return self.head(features)

    model = Probe()
    with TokenTap(model, "vit.blocks.1") as tap:
        model(torch.rand(2, 3, 64, 64)).sum().backward()
    assert not tap.tokens.requires_grad


def test_tokens_are_one_tensor():
    model, x = vit(), torch.rand(2, 3, 64, 64)
    with TokenTap(model, "blocks.1") as tap:
        model(x)
        with torch.no_grad():
            assert tap.tokens.grad_fn is None
        (gradient,) = torch.autograd.grad(tap.tokens.square().sum(), tap.tokens)
        torch.testing.assert_close(gradient, 2 * tap.tokens)
        before = tap.tokens
        model(x)
        assert tap.tokens is not before


def test_compiled_inside_of_the_context():  # W4
    model = vit(depth=2)
    x = torch.rand(2, 3, 64, 64)
    with TokenTap(model, "blocks.0") as tap:
        model(x)
        expected = tap.tokens
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled(x)
        torch.testing.assert_close(tap.tokens, expected)
        assert tap.grid == (4, 4)
        x = torch.rand(2, 3, 64, 64)
        with torch.no_grad():
            model(x)  # as it is, and compiled once more: always the last counts
            expected = tap.tokens
        compiled(x)
        assert tap.tokens.requires_grad
        torch.testing.assert_close(tap.tokens, expected)
        tap.tokens.sum().backward()


def test_compiled_before_is_refused():
    compiled, in_place, model = torch.compile(vit()), vit(), vit(depth=1)
    in_place.compile()
    for wrong in (compiled, in_place):
        with pytest.raises(ValueError, match="TokenTap: model must be wrapped first and compiled after"):
            TokenTap(wrong, "blocks.1")
    compiled = torch.compile(model, backend="aot_eager")
    compiled(torch.rand(1, 3, 64, 64))
    with TokenTap(model, "blocks.0") as tap:
        compiled(torch.rand(1, 3, 64, 64))
        with pytest.raises(ValueError, match="a model compiled before that does not see the tap"):
            tap.tokens  # noqa: B018
    torch._dynamo.reset()


def test_a_layer_that_runs_twice_leaves_its_last():  # W2
    layer = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    with TokenTap(model, "0") as tap:
        output = model(torch.rand(1, 3, 4, 6))
    assert torch.equal(tap.tokens, output.flatten(2).transpose(1, 2))


def test_an_output_changed_in_place_is_refused():  # W2
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
    with TokenTap(model, "0") as tap, torch.no_grad():
        model(torch.rand(1, 3, 4, 4))
        with pytest.raises(ValueError, match="layer '0' must not be followed by an operation in place"):
            tap.tokens  # noqa: B018
    with TokenTap(model, "1") as tap, torch.inference_mode():
        model(torch.rand(1, 3, 4, 4))
        assert (tap.tokens >= 0).all()


@torch.no_grad()
def test_two_threads_do_not_mix():  # W7
    model = vit(dynamic_img_size=True)
    with TokenTap(model, "blocks.1") as tap:

        def work(size):
            model(torch.rand(1, 3, *size))
            return tap.grid == (size[0] // 16, size[1] // 16)

        assert in_two_threads(work, [(64, 64), (32, 96)])


def test_what_cannot_be_found_out_can_be_said():
    class Odd(nn.Module):
        def __init__(self, *shape):
            super().__init__()
            self.shape, self.inner = shape, nn.Identity()

        def forward(self, x):
            return self.inner(torch.zeros(len(x), *self.shape))

    x = torch.rand(2, 3, 8, 8)
    for shape, options, tokens, grid in (
        ((19, 5), {"num_prefix_tokens": 3}, (2, 16, 5), (4, 4)),
        ((4, 4, 4), {"channels_last": True}, (2, 16, 4), (4, 4)),
        ((2, 8, 5), {"channels_last": True}, (2, 16, 5), (2, 8)),
        ((5, 2, 8), {"channels_last": False}, (2, 16, 5), (2, 8)),
    ):
        model = Odd(*shape)
        with TokenTap(model, "inner", **options) as tap:
            model(x)
        assert (tuple(tap.tokens.shape), tap.grid) == (tokens, grid)
    for shape in ((17, 5), (20, 5), (3,), ()):  # of a square image no 4 x 5
        model = Odd(*shape)
        with TokenTap(model, "inner"), pytest.raises(ValueError, match=r"layer must be one whose output is a map"):
            model(x)


def test_outputs_that_are_no_tensor_are_refused():  # R2
    model = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3))
    with TokenTap(model, "1"), pytest.raises(TypeError, match="layer must be one whose output is a tensor.*got tuple"):
        model(torch.rand(2, 4, 3))


@pytest.mark.parametrize(
    ("make", "layer", "options", "message"),
    [
        (vit, "block.2", {}, r"layer must be the name of a submodule, such as 'blocks.*got 'block.2'"),  # W1
        (vit, "", {}, "layer must be the name of a submodule"),
        (vit, 2, {}, "layer must be the name of a submodule"),
        (lambda: vit, "blocks.2", {}, "model must be a torch.nn.Module, got function"),
        (vit, "blocks.2", {"num_prefix_tokens": -1}, "num_prefix_tokens must be at least 0"),
        (vit, "blocks.2", {"channels_last": "NHWC"}, "channels_last must be one of None, True, False"),
        (lambda: timm.create_model("hiera_tiny_224"), "blocks.2", {}, "model .* row by row, got Hiera, which reorders"),
    ],
)
def test_wrong_arguments(make, layer, options, message):
    with pytest.raises((TypeError, ValueError), match=f"^TokenTap: {message}"):
        TokenTap(make(), layer, **options)


def test_a_tap_out_of_its_context():
    tap = TokenTap(vit(), "blocks.2")
    for name in ("tokens", "grid"):
        with pytest.raises(ValueError, match="layer 'blocks.2' must run inside of the context"):
            getattr(tap, name)
    with tap, pytest.raises(ValueError, match="the tap must be entered once at a time"):
        tap.__enter__()
    assert not hooks(tap.model)


def test_several_batches_and_masked_tokens_are_refused_in_words():
    model = vit()
    several = r"TokenTap: images must be one batch .*, got a list of 2 batches, of 32 x 32"
    with TokenTap(model, "blocks.1"), pytest.raises(TypeError, match=several):
        model([torch.rand(2, 3, 32, 32)] * 2)
    hidden = r"of all patches, none masked, after 0 others \(num_prefix_tokens\), got"
    with TokenTap(model, "blocks.1", num_prefix_tokens=0), pytest.raises(ValueError, match=hidden):
        model(torch.rand(2, 3, 64, 64))


def test_prefix_tokens_of_a_model_inside_of_another():
    """As behind a normalisation."""
    wrapper, images = nn.Sequential(nn.Identity(), vit()), torch.rand(2, 3, 64, 64)
    with TokenTap(wrapper, "1.blocks.1") as tap, TokenTap(wrapper[1], "blocks.1") as inner:
        wrapper(images)
    assert tap.grid == (4, 4)
    assert torch.equal(tap.tokens, inner.tokens)


def test_lightlys_masked_vit():
    """``LateClassToken`` refuses it and names the tap, which reads its tokens, unless some are left out."""
    modules = pytest.importorskip("lightly.models.modules", reason="needs the examples extra")
    wrapped, images = modules.MaskedVisionTransformerTIMM(vit()), torch.rand(2, 3, 64, 64)
    with pytest.raises(ValueError, match="got MaskedVisionTransformerTIMM; TokenTap reads the tokens of any layer"):
        LateClassToken(wrapped, 1)
    with TokenTap(wrapped, "vit.blocks.1") as tap:
        wrapped(images)
    assert tap.grid == (4, 4)
    kept = torch.arange(7).expand(2, 7)
    with TokenTap(wrapped, "vit.blocks.1"), pytest.raises(ValueError, match="of all patches, none masked"):
        wrapped.encode(images, idx_keep=kept)
