# %% [markdown]
# # A token map that turns
#
# A vision transformer makes a map of tokens from an image. When the image turns, does the map
# turn with it? This notebook turns images and maps with the same object, measures how well they
# agree, and trains a small network until they agree better. It runs in well under a minute on one
# CPU core, and downloads nothing.
#
# The data: the two photographs and the handwritten digits that come with scikit-learn. (The
# photographs are by danielbuechele and vultilion, CC BY 2.0.)

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from timm.models.vision_transformer import VisionTransformer

from equireg import GridTransform, SERLoss, TokenTap, equivariance_score

plt.rcParams["figure.dpi"] = 80
torch.manual_seed(0)
photographs = torch.stack([torch.tensor(image) for image in load_sample_images().images])
photographs = photographs.permute(0, 3, 1, 2).float() / 255  # [2, 3, 427, 640]

# %% [markdown]
# ## One object for images and for tokens
#
# `GridTransform` flips, then turns counter-clockwise, then stretches to another number of
# patches. `on_images` moves the pixels, `on_tokens` the places of a token map. Here each token is
# simply the mean colour of its patch.


# %%
def patch_means(images):
    return F.avg_pool2d(images, 16).flatten(2).transpose(1, 2)  # [B, T, 3], row by row


def element(turns, flip, target=(8, 8)):
    return GridTransform(torch.tensor([turns]), torch.tensor([flip]), (8, 8), target)


flower = photographs[1:, :, 40:424, 130:514]
flower = F.interpolate(flower, (128, 128), mode="area")  # 8 x 8 patches of 16 pixels
elements = {
    "as it is": element(0, False),
    "a quarter turn": element(1, False),
    "flipped": element(0, True),
    "flipped, half a turn": element(2, True),
    "stretched": element(0, False, (6, 11)),
}
for name, g in elements.items():
    print(f"{name:22}{equivariance_score(patch_means, flower, g).item():.4f}")

# %% mystnb={"image": {"alt": "A flower and its mean colours, turned, flipped and stretched alike"}}
figure, rows = plt.subplots(2, 5, figsize=(9, 3.6), layout="constrained")
for upper, lower, (name, g) in zip(*rows, elements.items()):
    upper.imshow(g.on_images(flower, 16)[0].permute(1, 2, 0).clamp(0, 1))
    lower.imshow(g.on_tokens(patch_means(flower)).view(*g.target, 3).clamp(0, 1))
    upper.set_title(name, fontsize=9)
for axes in rows.flat:
    axes.set(xticks=[], yticks=[])
rows[0, 0].set_ylabel("on_images")
rows[1, 0].set_ylabel("on_tokens")
plt.show()

# %% [markdown]
# The numbers are the score: the cosine between the moved map of an image and the map of the moved
# image. Mean colours turn and flip exactly, so the score is 1. Stretching resamples, which costs
# a little.
#
# ## Does the map of a transformer turn?
#
# A small vision transformer of timm, with random weights. `TokenTap` reads the tokens behind its
# second block. We measure on images that training will not see: crops of the right halves of the
# photographs, and digits.
#
# Tokens that are alike everywhere score high without turning. `shuffled=True` gives that floor:
# it compares each image with the turned map of *another* image.

# %%
vit = VisionTransformer(
    32, 4, embed_dim=64, depth=2, num_heads=4, num_classes=0, dynamic_img_size=True
)


def encode(images):
    with TokenTap(vit, "blocks.1") as tap:
        vit(2 * images - 1)
    return tap.tokens


def crops(photographs, count):
    height, width = (side - 32 for side in photographs.shape[2:])
    places = zip(
        torch.randint(2, (count,)), torch.randint(height, (count,)), torch.randint(width, (count,))
    )
    return torch.stack([photographs[i, :, y : y + 32, x : x + 32] for i, y, x in places])


small = F.interpolate(photographs, scale_factor=0.5, mode="area")
left, right = small[..., :160], small[..., 160:]
digits = torch.tensor(load_digits().images)[:, None].float() / 16
digits = F.interpolate(digits, (32, 32), mode="bilinear").expand(-1, 3, -1, -1)
unseen = {"photographs": crops(right, 60), "digits": digits[1200:1260]}

turns, none = torch.arange(60) % 3 + 1, torch.zeros(60, dtype=torch.int64)
moves = {
    "turn": GridTransform(turns, none > 0, (8, 8), (8, 8)),
    "flip": GridTransform(none, none == 0, (8, 8), (8, 8)),
    "stretch": GridTransform(none, none > 0, (8, 8), (7, 10)),
}


def measure():
    vit.eval()
    return {
        (kind, move): [
            equivariance_score(encode, images, g, shuffled=s).mean().item() for s in (False, True)
        ]
        for kind, images in unseen.items()
        for move, g in moves.items()
    }


def three_colours(tokens):  # the three main directions of the maps, as red, green and blue
    centred = (tokens - tokens.mean((0, 1))).flatten(0, 1)
    main = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:3].T
    low, high = main.quantile(0.02, 0), main.quantile(0.98, 0)
    return ((main - low) / (high - low)).clamp(0, 1).view(2, 8, 8, 3)


@torch.no_grad()
def two_maps():
    """The turned map of a photograph, and the map of the turned photograph."""
    flower = F.interpolate(photographs[1:, :, 40:424, 130:514], (32, 32), mode="area")
    g = elements["a quarter turn"]
    return three_colours(torch.cat([g.on_tokens(encode(flower)), encode(g.on_images(flower, 4))]))


before, maps_before = measure(), two_maps()

# %% [markdown]
# ## Train with SERLoss
#
# Of each image two views are taken, by random elements `g1` and `g2`. `SERLoss` moves the first
# map by `g2 @ g1.inverse()`, onto the second one. Tokens at one place attract; tokens of other
# images repel. In practice it stands beside another loss, as `loss + 0.5 * ser(...)`; here it is
# alone, for 100 steps.

# %%
ser = SERLoss(64, projection_dim=64, token_norm=True)
optimizer = torch.optim.AdamW([*vit.parameters(), *ser.parameters()], lr=2e-3)
vit.train()
for step in range(100):
    images = torch.cat([crops(left, 12), digits[torch.randint(1200, (12,))]])
    g1, g2 = (GridTransform.random(24, (8, 8)) for _ in range(2))
    loss = ser(encode(g1.on_images(images, 4)), encode(g2.on_images(images, 4)), g1, g2)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 33 == 0:
        print(f"step {step:3}  loss {loss.item():.2f}")

after, maps_after = measure(), two_maps()

# %%
print(f"{'':22}{'untrained':>10}{'floor':>8}{'trained':>10}{'floor':>8}")
for (kind, move), (score, floor) in before.items():
    new_score, new_floor = after[kind, move]
    print(f"{kind:12}{move:10}{score:10.3f}{floor:8.3f}{new_score:10.3f}{new_floor:8.3f}")

# %% mystnb={"image": {"alt": "Scores of three moves, untrained and trained, with their floors"}}
figure, panels = plt.subplots(1, 2, figsize=(8, 3.3), sharey=True, layout="constrained")
for axes, kind in zip(panels, unseen):
    for place, (name, scores) in enumerate({"untrained": before, "trained": after}.items()):
        score, floor = torch.tensor([scores[kind, move] for move in moves]).T
        at = torch.arange(3) + 0.4 * (place - 0.5)
        axes.bar_label(axes.bar(at, score, 0.36, label=name), fmt="%.2f", fontsize=9)
        axes.hlines(
            floor, at - 0.18, at + 0.18, "black", label="floor: another image" if place else None
        )
    axes.set(title=f"unseen {kind}", xticks=range(3), ylim=(min(0, axes.get_ylim()[0]), 1.12))
    axes.set_xticklabels(moves)
panels[0].set_ylabel("equivariance score")
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# The two maps of the flower, as colours: in each pair the left one is the turned map, the right
# one the map of the turned photograph. Where they agree, the map turned.

# %% mystnb={"image": {"alt": "Two pairs of token maps as colours: before training and after"}}
figure, row = plt.subplots(1, 4, figsize=(8, 2.4), layout="constrained")
for axes, colours, name in zip(
    row, [*maps_before, *maps_after], 2 * ["its map, turned", "map of the turned image"]
):
    axes.imshow(colours)
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(name)
row[0].set_title("untrained", loc="left")
row[2].set_title("trained", loc="left")
plt.show()

# %% [markdown]
# ## What came out
#
# - With random weights the map already turns in part. A high score alone says little.
# - After 100 steps all scores are higher, on images that were not trained on.
# - On photographs the floor does not rise. On digits it rises more than the score: less the floor,
#   their score falls. Their maps became more alike, so the higher score is no gain there.
# - The score does not say what the tokens are good for. Here SER is the only loss; in a
#   pre-training it stands beside one that learns what is in the image.
#
# [SER](../ser.md) explains the loss and its place in a training. [Results](../results.md) says
# what it gained there.
