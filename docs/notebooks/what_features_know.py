# %% [markdown]
# # What do my features still know?
#
# A network that learns classes may forget how its images were turned or moved. Some tasks need to
# know. This notebook asks the frozen features of a small network what they know: with random
# weights, trained on upright digits, and trained on moved digits. It runs in well under a minute
# on one CPU core, and downloads nothing.
#
# The data: scikit-learn's handwritten digits, enlarged to 16 x 16 pixels.

# %%
from collections import OrderedDict

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from equireg import (
    IntermediateViews,
    extract_view_features,
    knn_accuracy,
    linear_probe,
    transformation_accuracy,
    transformation_r2,
)

plt.rcParams["figure.dpi"] = 80
torch.manual_seed(0)
order = torch.randperm(1797)
images = torch.tensor(load_digits().images)[order, None].float() / 16
images = F.interpolate(images, (16, 16), mode="bilinear")  # [1797, 1, 16, 16]
labels = torch.tensor(load_digits().target)[order]
train, test = slice(0, 1200), slice(1200, None)

# %% [markdown]
# ## A digit and its views
#
# `IntermediateViews("se2")` turns each image by up to 90 degrees to either side, and moves it by
# up to a quarter of its width and height. It returns the view, the images on the way there, and
# the parameters: angle, dx and dy.

# %% mystnb={"image": {"alt": "Three digits, their images on the way, and their views"}}
views = IntermediateViews("se2")
view, between, parameters = views(images[:3], torch.Generator().manual_seed(1))
figure, rows = plt.subplots(3, 4, figsize=(5.5, 4.4), layout="constrained")
for row, *path, (angle, dx, dy) in zip(rows, images[:3], *between, view, parameters.tolist()):
    for axes, image in zip(row, path):
        axes.imshow(image[0], cmap="gray")
        axes.set(xticks=[], yticks=[])
    row[-1].set_xlabel(f"{angle:.0f}°, {dx:.1f}, {dy:.1f}")
for axes, title in zip(rows[0], ("image", "a third", "two thirds", "view")):
    axes.set_title(title, fontsize=9)
plt.show()

# %% [markdown]
# ## Three networks
#
# The same small network each time. The last one learns the class of *moved* digits, as one does
# who wants features that do not depend on how an image lies.


# %%
def stage(inside, outside, *last):
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU(), *last
    )


def network():
    torch.manual_seed(0)  # the same random weights
    stages = {
        "early": stage(1, 16, nn.MaxPool2d(2)),
        "middle": stage(16, 32, nn.MaxPool2d(2)),
        "late": stage(32, 64),
    }
    ends = {"pool": nn.AdaptiveAvgPool2d(2), "flat": nn.Flatten(), "head": nn.Linear(256, 10)}
    return nn.Sequential(OrderedDict(stages | ends))


def trained(moved):
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(15):
        for idx in torch.randperm(1200).split(100):
            x = views(images[idx])[0] if moved else images[idx]
            loss = F.cross_entropy(net(x), labels[idx])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net


networks = {"random": network(), "upright": trained(moved=False), "moved": trained(moved=True)}

# %% [markdown]
# ## Four questions
#
# - **Which class?** `knn_accuracy` asks the 20 nearest training digits; `linear_probe` fits a
#   linear classifier on frozen features. The digits are upright here.
# - **How was it moved?** `extract_view_features` encodes each digit and its view;
#   `transformation_r2` predicts angle, dx and dy from both features and returns R² on held-out
#   digits: 1 is exact, 0 is no better than the mean, below 0 is worse.
# - **Does the output still tell?** The same question to the ten scores behind the head.
# - **How many quarter turns?** `transformation_accuracy` asks the means of each layer; chance is
#   25%.


# %%
def r2_of_movement(encoder):
    generator = torch.Generator().manual_seed(0)  # the same movements each time
    pairs = extract_view_features(
        encoder, images.split(300), views, generator=generator, progress=False
    )
    return transformation_r2(*pairs, hidden_dim=128, progress=False).tolist()


answers = {}
for name, net in networks.items():
    encoder = net.eval()[:-1]  # without the head: [B, 256]
    with torch.no_grad():
        features = encoder(images)
    known = (features[train], labels[train], features[test], labels[test])
    answers[name] = {
        "class (accuracy)": {"k-NN": knn_accuracy(*known), "linear": linear_probe(*known)},
        "movement, from features (R²)": dict(zip(views.parameter_names, r2_of_movement(encoder))),
        "movement, from the output (R²)": dict(zip(views.parameter_names, r2_of_movement(net))),
        "quarter turns, by layer (accuracy)": transformation_accuracy(
            net, images.split(300), ["early", "middle", "late"], progress=False
        ),
    }

for title in answers["random"]:
    print(f"{title:36}" + "".join(f"{question:>8}" for question in answers["random"][title]))
    for name in answers:
        print(
            f"    {name:32}" + "".join(f"{value:8.2f}" for value in answers[name][title].values())
        )

# %% mystnb={"image": {"alt": "What each network knows: class, movement, quarter turns by layer"}}
figure, panels = plt.subplots(2, 2, figsize=(8, 5.5), sharey=True, layout="constrained")
for axes, title in zip(panels.flat, answers["random"]):
    for place, (name, found) in enumerate(answers.items()):
        values = list(found[title].values())
        axes.bar(torch.arange(len(values)) + 0.27 * (place - 1), values, 0.24, label=name)
    axes.set(title=title, xticks=range(len(values)))
    axes.set_xticklabels(found[title])
    axes.axhline(0, color="black", linewidth=0.8)
panels[1, 1].axhline(0.25, color="black", linestyle=":", label="chance")
figure.legend(*panels[1, 1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
plt.show()

# %% [markdown]
# ## How to read it
#
# - **Random weights are the control.** They know nearly as much as trained ones here: digits are
#   easy, and a convolution keeps much of its input. So a high number alone is no merit of a
#   training.
# - **Training on upright digits** helps the classes a little.
# - **Training on moved digits** did not take the movement out of the features. It is the *output*
#   of this network that tells less of it than the output of the others, for all three parameters.
#   So where you read features matters: ask each layer before you take its features for a task.
# - The angle is the hardest, with few pairs: 1,437 to fit the regressor. With more pairs R² comes
#   out higher. Two thirds of the digits were also used to train the networks.
#
# [Measuring features](../guides/measuring.md) has all probes.
# [Reconstruction](../reconstruction.md) is a loss that keeps the transformation in features.
