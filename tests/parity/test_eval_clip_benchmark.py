"""Whole sets through clip-benchmark's own evaluation and through ours: the same answers, sample by sample."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import classify, encoder_of

from evatool.core.image_norm import normalize_images
from evatool.data.eval.eval_set import open_eval_set
from evatool.data.image.eval_transforms import EvalTransform
from evatool.eval.tasks.retrieval_features import encode_pairs, retrieve
from evatool.formats.safetensors import write_safetensors
from evatool.inference.loaded_clip import LoadedClip, load_clip
from evatool.model.text import encode_text
from evatool.recipe.schema import DataPrepareRecipe, DrawingsSource
from evatool.runs.run_dir import RunOptions
from evatool.stages import data_prepare

pytestmark = pytest.mark.parity

CONCEPTS = 120
FITTED = ["new-artist", "never-seen", "coarse-group"]
FITTING_STEPS = 150


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity") / "run"
    recipe = DataPrepareRecipe(data=DrawingsSource(max_concepts=CONCEPTS, num_unseen=10))
    data_prepare.run(recipe, RunOptions(name="test", run_dir=folder))
    return folder / "eval"


@pytest.fixture(scope="module")
def clip() -> LoadedClip:
    torch.manual_seed(0)
    return load_clip("EVA02-CLIP-toy-small")


def theirs(folder: Path, clip: LoadedClip, task: str):
    """clip-benchmark's data set and loader, with open_clip's transform."""
    from clip_benchmark.datasets.builder import build_dataset, get_dataset_collate_fn

    dataset = build_dataset(
        f"wds/{folder.name}", root=str(folder), transform=clip.preprocess, split="test", download=False, task=task
    )
    collate = get_dataset_collate_fn("mscoco_captions") if task == "zeroshot_retrieval" else None
    return dataset, torch.utils.data.DataLoader(dataset, batch_size=64, collate_fn=collate)


@pytest.mark.parametrize("name", ["new-artist", "black-and-white", "coarse-subgroup"])
def test_answers_are_the_same_sample_by_sample(sets: Path, clip: LoadedClip, name: str) -> None:
    from clip_benchmark.metrics.zeroshot_classification import run_classification, zero_shot_classifier

    dataset, loader = theirs(sets / name, clip, "zeroshot_classification")
    weights = zero_shot_classifier(clip, clip.tokenizer, dataset.classes, dataset.templates, "cpu", amp=False)
    logits, target = run_classification(clip, weights, loader, "cpu", amp=False)
    opened = open_eval_set(sets / name, transform=EvalTransform(clip.image_size), batch_size=50, num_threads=2)
    ours = classify(clip, clip.tokenizer, opened)
    assert ours.labels.tolist() == target.tolist()
    flips = np.flatnonzero(ours.top[:, 0] != logits.argmax(dim=1).numpy())
    assert set(flips) <= set(ours.near_ties), "a flip that is no near tie"
    own = logits.gather(1, target[:, None])
    assert np.abs(ours.rank - (logits > own).sum(1).numpy()).max() <= 1  # ties far down may fall either way


def test_recalls_are_the_same(sets: Path, clip: LoadedClip) -> None:
    from clip_benchmark.metrics.zeroshot_retrieval import evaluate

    _, loader = theirs(sets / "retrieval", clip, "zeroshot_retrieval")
    reference = evaluate(clip, loader, clip.tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    opened = open_eval_set(sets / "retrieval", transform=EvalTransform(clip.image_size), batch_size=50)
    answers = retrieve(encode_pairs(encoder_of(clip), opened))
    for k in (1, 5, 10):
        assert answers.hits("text_to_image", k).mean() == pytest.approx(reference[f"image_retrieval_recall@{k}"])
        assert answers.hits("image_to_text", k).mean() == pytest.approx(reference[f"text_retrieval_recall@{k}"])


@pytest.mark.parametrize(("precision", "least"), [("bf16", 0.999), ("fp16", 0.99999)])
def test_half_weights_change_logits_by_less_than_their_own_rounding(
    sets: Path, clip: LoadedClip, precision: str, least: float
) -> None:
    """Of random weights, whose answers are near ties; the next test has answers to lose."""
    torch.manual_seed(0)
    half = load_clip("EVA02-CLIP-toy-small", precision=precision)
    opened = open_eval_set(sets / "new-artist", transform=EvalTransform(clip.image_size), batch_size=64)
    images = next(iter(opened.loader))[0]
    cosine = torch.cosine_similarity(half.encode_image(images), clip.encode_image(images))
    assert float(cosine.min()) > least


@pytest.fixture(scope="module")
def fitted(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that was fitted to the very sets, saved: its answers have margins, as a trained model's have."""
    torch.manual_seed(0)
    clip = load_clip("EVA02-CLIP-debug")
    parameters = list(clip.model.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=6e-4, weight_decay=0.0)
    opened = [open_eval_set(sets / name, transform=EvalTransform(clip.image_size), batch_size=1000) for name in FITTED]
    batches = [next(iter(one.loader)) for one in opened]
    pixels, sizes = torch.cat([images for images, _ in batches]), [len(images) for images, _ in batches]
    prompts = [[one.templates[0].replace("{c}", name) for name in one.classnames] for one in opened]
    tokens = clip.tokenizer([prompt for own in prompts for prompt in own])[:, :16]
    for _ in range(FITTING_STEPS):
        images = clip.model.encode_image(normalize_images(pixels), normalize=True).split(sizes)
        texts = torch.nn.functional.normalize(encode_text(clip.model, tokens), dim=-1).split([len(p) for p in prompts])
        logits = [30 * image @ text.T for image, text in zip(images, texts, strict=True)]
        losses = [torch.nn.functional.cross_entropy(own, y) for own, (_, y) in zip(logits, batches, strict=True)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    folder = tmp_path_factory.mktemp("fitted")
    (folder / "model_config.json").write_text(json.dumps(clip.config.to_json()))
    write_safetensors(folder / "model.safetensors", {k: v.detach() for k, v in clip.model.named_parameters()})
    return folder


@pytest.mark.slow
def test_bf16_weights_keep_top1_over_all_sets(sets: Path, fitted: Path) -> None:
    """Right answers over all sets, pictures counting the same: ours in bf16 against clip-benchmark's in float32."""
    from clip_benchmark.metrics.zeroshot_classification import run_classification, zero_shot_classifier

    whole, half = load_clip(fitted), load_clip(fitted, precision="bf16")
    right = {"float32": 0, "bf16": 0}
    total = 0
    for name in FITTED:
        dataset, loader = theirs(sets / name, whole, "zeroshot_classification")
        weights = zero_shot_classifier(whole, whole.tokenizer, dataset.classes, dataset.templates, "cpu", amp=False)
        logits, target = run_classification(whole, weights, loader, "cpu", amp=False)
        answers = classify(
            half,
            half.tokenizer,
            open_eval_set(sets / name, transform=EvalTransform(half.image_size), batch_size=64),
        )
        right["float32"] += int((logits.argmax(dim=1) == target).sum())
        right["bf16"] += int(answers.correct(1).sum())
        total += len(target)
    assert right["float32"] > 0.7 * total
    assert abs(right["bf16"] - right["float32"]) <= 0.0005 * total, right
