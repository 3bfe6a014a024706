"""Fine-tuning of a pretrained encoder on few labelled images, all weights, as SER's Table 3 has it beside probes."""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from evidence.datasets import folders
from evidence.experiments import Settings
from evidence.networks import encode
from evidence.views import crops
from torch import nn
from vipriors.training import cosine, seed_everything


def fine_tuned(objective: nn.Module, s: Settings, folder: Path, shots: int, seed: int) -> float:
    """The share of test images that are classified right; the encoder of ``objective`` stays as it is."""
    few = folders(folder, "train", s["image_size"], draw=seed, shots=shots)
    test = folders(folder, "test", s["image_size"])
    seed_everything(seed, "fine-tuning")
    classes = int(few.labels.max()) + 1
    model = nn.Sequential(copy.deepcopy(objective.backbone), nn.Linear(objective.network.num_features, classes)).train()
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.to(device).parameters(), lr=0.001, weight_decay=0.05)
    batches = [batch for _ in range(s["r2_epochs"]) for batch in torch.randperm(len(few.labels)).split(50)]
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = cosine(step, len(batches), 0.001, warmup=len(batches) // 10)
        views = crops(few.pixels[batch].to(device) / 255, s["image_size"], 0.5)
        loss = F.cross_entropy(model(views), few.labels[batch].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logits = encode(model.eval(), test.pixels)
    return (logits.argmax(1) == test.labels).float().mean().item()
