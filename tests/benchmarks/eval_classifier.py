"""The text classifier of ImageNet's names and prompts: ours against clip-benchmark's, and a second time from disk.

    python tests/benchmarks/eval_classifier.py [--width 128] [--layers 2] [--classes 1000] [--baseline-classes 100]

A text tower of CLIP's 77 tokens with random weights; both sides encode with it, in the same process and threads.
clip-benchmark encodes class after class, so its time for all classes is taken from `--baseline-classes` of them, spread
evenly. Gate: features of those classes equal to 2e-6, and the second build equal to the first bit by bit.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from importlib import resources
from pathlib import Path

import torch
from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier

from evatool.distributed.world import init_world
from evatool.eval.cache import TensorCache
from evatool.eval.encode import Encoding
from evatool.eval.text_classifier import text_classifier
from evatool.inference.loaded_clip import load_clip
from evatool.model.presets import resolve_preset
from evatool.recipe.schema import EvalSection
from evatool.stages.evaluating.models import load_eval_model


def prompts(what: str) -> list[str]:
    """ImageNet's entry of one of clip-benchmark's tables."""
    text = resources.files("clip_benchmark").joinpath(f"datasets/en_{what}.json").read_text(encoding="utf-8")
    return json.loads(text)["imagenet1k"]


def main() -> None:
    """Print both times, their ratio, and that of the second build."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--baseline-classes", type=int, default=100)
    asked = parser.parse_args()
    classnames, templates = prompts("classnames")[: asked.classes], prompts("zeroshot_classification_templates")
    with tempfile.TemporaryDirectory() as cache:
        config = Path(cache) / "model.json"
        text = {"context_length": 77, "width": asked.width, "heads": asked.width // 64, "layers": asked.layers}
        config.write_text(json.dumps(resolve_preset("EVA02-CLIP-toy").to_json() | {"text_cfg": text}))
        section = EvalSection(models={"m": "random weights"}, model_configs={"m": str(config)}, data=Path())
        model = load_eval_model("m", "random weights", section, init_world(), None)
        how = Encoding(model.device, model.trims_text)
        store = TensorCache(Path(cache), "classifiers", model.origin, model.tokenizer_key)
        build = lambda names: text_classifier(  # noqa: E731
            model, model.tokenizer, names, templates, how, name="benchmark", stores=[store]
        )
        build(classnames[:2])  # warm
        started = time.perf_counter()
        ours = build(classnames)
        first = time.perf_counter() - started
        started = time.perf_counter()
        again = build(classnames)
        second = time.perf_counter() - started
        assert torch.equal(ours, again)
        torch.manual_seed(section.seed)
        clip = load_clip("random weights", str(config), device=model.device)

    step = max(1, len(classnames) // asked.baseline_classes)
    chosen = list(range(0, len(classnames), step))[: asked.baseline_classes]
    started = time.perf_counter()
    names = [classnames[i] for i in chosen]
    # the model's own `encode_text`: 77 tokens a prompt
    theirs = zero_shot_classifier(clip, clip.tokenizer, names, templates, model.device.split(":")[0], amp=False)
    taken = time.perf_counter() - started
    difference = float((theirs - ours[:, chosen]).abs().max())
    assert difference < 2e-6, f"the classifiers differ by {difference}"
    whole = taken * len(classnames) / len(chosen)
    print(
        f"text tower {asked.width} x {asked.layers} on {model.device}, fp32, "
        f"{len(classnames)} classes x {len(templates)} prompts"
    )
    print(f"clip-benchmark {whole:9.2f} s   ({len(chosen)} classes in {taken:.2f} s)")
    print(f"evatool        {first:9.2f} s   {whole / first:7.1f} x   largest difference {difference:.1e}")
    print(f"from disk      {second:9.4f} s   {first / second:7.1f} x")


if __name__ == "__main__":
    main()
