"""The classes that the guide shows, under Hugging Face's own Trainer. Nothing is downloaded."""

import copy
import os

import pytest
import torch
import torch.nn.functional as F

from tests.test_docs import DOCS, blocks

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
pytest.importorskip("datasets", reason="needs the dev extra")
transformers = pytest.importorskip("transformers", reason="needs the dev extra")


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """The names of the page after it ran."""
    names, before = {"__name__": "guide"}, os.getcwd()
    os.chdir(tmp_path_factory.mktemp("guide"))
    try:
        exec("\n".join(blocks(DOCS / "guides/huggingface.md", "python")), names)  # noqa: S102
    finally:
        os.chdir(before)
    return names


def arguments(folder, **options):
    """One step of plain gradient descent takes the whole dataset, in two parts."""
    options = {"max_steps": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 0, "save_strategy": "no", **options}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "remove_unused_columns": False}
    return transformers.TrainingArguments(folder, per_device_train_batch_size=24, **options, **quiet)


def columns(dataset):
    return (dataset[:][name] for name in ("pixel_values", "labels", "index"))


def test_the_step_is_that_of_the_weighted_mean_whatever_is_accumulated(guide, tmp_path):
    model, dataset = guide["ViTForImageClassification"](guide["config"]), guide["dataset"]
    plain = copy.deepcopy(model)
    optimizers = torch.optim.SGD(model.parameters(), lr=0.5), None
    given = arguments(tmp_path, lr_scheduler_type="constant")
    guide["WeightedTrainer"](model, given, train_dataset=dataset, optimizers=optimizers).train()
    x, y, index = columns(dataset)
    losses = F.cross_entropy(plain(x).logits, y, reduction="none")
    (guide["environments"].weights(sharpness="auto")[index] * losses).mean().backward()
    for moved, start in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(moved, start - 0.5 * start.grad, atol=1e-6)
    assert not torch.equal(model.classifier.weight, plain.classifier.weight)


def invariant(guide):
    torch.manual_seed(5)
    model = guide["InvariantViT"](guide["config"])
    model.irm.fit_environments(guide["loader"], encoder=model.features, progress=False)
    return model


def test_the_loss_is_trained_and_evaluated_through_its_mask(guide, tmp_path):
    model, dataset = invariant(guide), guide["dataset"]
    before = copy.deepcopy(model.irm.state_dict())
    trainer = guide["Trainer"](model, arguments(tmp_path), train_dataset=dataset, eval_dataset=dataset)
    trainer.train()
    for name, parameter in model.irm.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    x, y, _ = columns(dataset)
    with torch.no_grad():
        masked = model.eval().features(x) * model.irm.mask.weight.sigmoid()
        by_hand = F.cross_entropy(masked @ model.classifier.weight.T + model.classifier.bias, y)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(by_hand.item(), rel=1e-5)

    model.save_pretrained(tmp_path / "saved")
    again = guide["InvariantViT"].from_pretrained(tmp_path / "saved").state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_the_folded_model_needs_no_equireg(guide, tmp_path):
    guide["plain"].save_pretrained(tmp_path)
    loaded = guide["ViTForImageClassification"].from_pretrained(tmp_path).eval()
    x, _, _ = columns(guide["dataset"])
    assert torch.allclose(loaded(x).logits, guide["model"].eval()(x).logits, atol=1e-6)


def test_a_resumed_run_has_the_loss_of_its_checkpoint(guide, tmp_path):
    """Into a model that found no environments. Of the rest of a ViT, transformers 5.24 forgets a part."""
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    models = invariant(guide), guide["InvariantViT"](guide["config"])
    for model, checkpoint in zip(models, (None, str(tmp_path / "checkpoint-2"))):
        trainer = guide["Trainer"](model, arguments(tmp_path, **options), train_dataset=guide["dataset"])
        trainer.train(resume_from_checkpoint=checkpoint)
    saved, loaded = (model.irm.state_dict() for model in models)
    assert models[1].irm.environments.fitted
    assert all(torch.equal(there, loaded[name]) for name, there in saved.items())
