"""The tables of docs/plan.md and of the README: what `evatool plan` says beside what was measured or published.

python tests/benchmarks/plan_tables.py            # print all of them; minutes, models on the meta device
python tests/benchmarks/plan_tables.py --write    # and put them into the page
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

from plan_speeds import speeds_table
from published_jobs import job_of

from evatool.model.presets import PRESETS, resolve_preset
from evatool.plan.estimate import memory
from evatool.plan.hardware import Assumptions, hardware
from evatool.plan.job import PlannedJob, job_of_recipe
from evatool.plan.memory import GIB, NUMERICS, image_activations, text_activations
from evatool.plan.pace import failures, pace
from evatool.plan.published import PARAMETERS, PUBLISHED_RUNS
from evatool.plan.towers import count_parameters, image_flops, text_flops
from evatool.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
PAGE, README = ROOT / "docs" / "plan.md", ROOT / "README.md"

CLIP = [name for name in PARAMETERS if PRESETS[name].task == "clip"]
TOWERS = ["EVA02-CLIP-B-16", "EVA02-CLIP-L-14", "EVA02-CLIP-L-14-336", "EVA02-CLIP-bigE-14-plus"]


def table(rows: list[list[str]]) -> str:
    """Markdown, header row first."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def parameters_table() -> str:
    rows = [["model", "image", "text", "total", "published, rounded"]]
    for name, published in PARAMETERS.items():
        said = count_parameters(resolve_preset(name))
        rows.append([name, f"{said.image:,}", f"{said.text:,}", f"{said.total:,}", published])
    return table(rows)


def fit_table() -> str:
    rows = [["run", "GPUs", "samples a GPU", "patch dropout", "ZeRO", "planned, GiB", "usable, GiB", "fits", "source"]]
    for run in PUBLISHED_RUNS:
        need, room = memory(job_of(run)).total / GIB, hardware(run.gpu).memory_gib
        cells = [
            run.name,
            f"{run.num_gpus} x {run.gpu}",
            str(run.per_gpu),
            f"{run.patch_dropout:g}",
            str(run.zero_stage),
        ]
        rows.append([*cells, f"{need:.1f}", f"{room:.1f}", "yes" if need <= room else "no", run.source])
    return table(rows)


def big_jobs() -> list[tuple[PlannedJob, str]]:
    """The 18B run as published, and on 256 newer accelerators at a batch that divides."""
    published = job_of(next(run for run in PUBLISHED_RUNS if run.name == "18B"))
    newer = replace(published, num_gpus=256, global_batch_size=256 * 422)
    return [(published, "a100-40"), (newer, "h100"), (newer, "mi300x")]


def big_table() -> str:
    rows = [["18B, 6 B samples, batch 108 k", "GiB of usable", "MFU", "days", "GPU-hours", "network, s a step"]]
    rows[0] += ["exposed", "failures", "save every", "binding"]
    assumed = Assumptions()
    for job, name in big_jobs():
        gpu = hardware(name)
        for mfu in gpu.mfu:
            each = pace(job, gpu, assumed, mfu)
            breaks = failures(job, assumed, each.step_sec)
            fit = f"{memory(job).total / GIB:.1f} of {gpu.memory_gib:.1f}"
            cells = [f"{job.num_gpus} x {name}", fit, f"{mfu:.0%}", f"{each.days:.1f}", f"{each.gpu_hours:,.0f}"]
            cells += [f"{each.traffic.seconds:.1f}", f"{each.traffic.exposed_seconds:.2f}", f"{breaks.expected:.1f}"]
            rows.append([*cells, f"{breaks.interval_sec / 3600:.1f} h", each.binding])
    return table(rows)


def operations_table() -> str:
    """Needs torch."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from evatool.model.clip import build_clip

    rows = [["model", "image, GFLOP", "counted", "off by", "text, GFLOP", "counted", "off by"]]
    for name in CLIP:
        config = resolve_preset(name)
        with torch.device("meta"):
            clip = build_clip(config)
            inputs = {
                "visual": torch.empty(1, 3, config.image_size, config.image_size),
                "text": torch.empty(1, config.context_length, dtype=torch.long),
            }
        cells = [name]
        for tower, said in (("visual", image_flops(config)), ("text", text_flops(config))):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                getattr(clip, tower)(inputs[tower])
            counted = counter.get_total_flops()
            cells += [f"{said / 1e9:,.2f}", f"{counted / 1e9:,.2f}", f"{said / counted - 1:+.2%}"]
        rows.append(cells)
    return table(rows)


def activations_table() -> str:
    """Needs torch."""
    from saved_bytes import tower_bytes

    settings = {
        "all": {},
        "products (selective)": {"checkpointing": "selective"},
        "inputs of blocks (full)": {"checkpointing": "full"},
        "half of the patches": {"patch_dropout": 0.5},
    }
    rows = [["tower", "arithmetic", "kept", "planned, MiB a sample", "measured", "off by"]]
    for name in TOWERS:
        for numerics in ("bf16", "autocast"):
            for words, setting in settings.items():
                said = image_activations(resolve_preset(name), NUMERICS[numerics], **setting).kept
                rows.append(
                    _compared(f"{name}, image", numerics, words, said, tower_bytes(name, "visual", numerics, **setting))
                )
    for name in TOWERS[1:4:2]:
        for numerics in ("bf16", "autocast"):
            said = text_activations(resolve_preset(name), NUMERICS[numerics]).kept
            rows.append(_compared(f"{name}, text", numerics, "all", said, tower_bytes(name, "text", numerics)))
    return table(rows)


def _compared(tower: str, numerics: str, words: str, said: float, measured: float) -> list[str]:
    return [tower, numerics, words, f"{said / 2**20:.1f}", f"{measured / 2**20:.1f}", f"{said / measured - 1:+.2%}"]


INSTANT = {"parameters": parameters_table, "fit": fit_table, "18b": big_table, "speeds": speeds_table}
MEASURED = {"operations": operations_table, "activations": activations_table}


def models_table() -> str:
    """README's table: one row a published model, with the planned hours on the hardware it was published with."""
    rows = [["model", "parameters", "recipe", "published ImageNet-1K zero-shot", "ours", "GPU-hours planned"]]
    for folder, (preset, gpu, num_gpus, accuracy) in PUBLISHED_MODELS.items():
        name = f"{folder}/train-clip"
        job = job_of_recipe(load_recipe(name).recipe, name, num_gpus)
        likely = pace(job, hardware(gpu), Assumptions(), hardware(gpu).mfu[1])
        parameters = f"{count_parameters(resolve_preset(preset)).total / 1e6:,.0f}M"
        hours = f"{float(f'{likely.gpu_hours:.2g}'):,.0f} ({num_gpus} x {gpu})"
        rows.append([preset, parameters, f"`{folder}/`", accuracy, "not trained here", hours])
    return table(rows)


# Accuracy as arXiv 2402.04252 (table 2) gives it; B/16, L/14, L/14-336 and E/14: EVA-CLIP README.
PUBLISHED_MODELS = {
    "eva01-clip-g-14": ("EVA01-CLIP-g-14", "a100-40", 256, "78.5 %"),
    "eva01-clip-g-14-plus": ("EVA01-CLIP-g-14-plus", "a100-40", 112, "79.3 %"),
    "eva02-clip-b-16": ("EVA02-CLIP-B-16", "a100-40", 64, "74.7 %"),
    "eva02-clip-l-14": ("EVA02-CLIP-L-14", "a100-40", 128, "79.8 %"),
    "eva02-clip-l-14-336": ("EVA02-CLIP-L-14-336", "a100-40", 128, "80.4 %"),
    "eva02-clip-e-14": ("EVA02-CLIP-bigE-14", "a100-80", 144, "81.9 %"),
    "eva02-clip-e-14-plus": ("EVA02-CLIP-bigE-14-plus", "a100-80", 144, "82.0 %"),
    "eva-clip-8b": ("EVA-CLIP-8B", "a100-40", 384, "83.5 %"),
    "eva-clip-8b-448": ("EVA-CLIP-8B-448", "a100-40", 384, "83.8 %"),
    "eva-clip-18b": ("EVA-CLIP-18B", "a100-40", 360, "83.8 %"),
    "eva-clip-18b-336": ("EVA-CLIP-18B-336", "a100-40", 360, "83.9 %"),
}


def replaced(page: str, name: str, text: str) -> str:
    """The page with the table between the markers of `name`."""
    start, end = f"<!-- table: {name} -->", "<!-- end -->"
    pattern = re.compile(re.escape(start) + r"\n.*?" + re.escape(end), re.DOTALL)
    assert pattern.search(page), f"the page has no place for {name}"
    return pattern.sub(lambda _: f"{start}\n{text}\n{end}", page)


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, build in (INSTANT | MEASURED).items():
        text = build()
        print(f"{name}\n{text}\n")
        page = replaced(page, name, text)
    models = models_table()
    print(f"models\n{models}")
    if "--write" in sys.argv:
        PAGE.write_text(page, encoding="utf-8")
        README.write_text(replaced(README.read_text(encoding="utf-8"), "models", models), encoding="utf-8")


if __name__ == "__main__":
    main()
