"""Peak memory and time of real training steps on a GPU beside what `evatool plan` says; says so where there is none.

python tests/benchmarks/plan_gpu.py [h100|h200|a100-40|a100-80|mi300x]

L/14 with 64, 256 and 1024 pairs, and one, two and four blocks of 18B's image tower; bf16, AdamW, one process. The
allocator's peak is compared with the plan's parts without context and fragmentation. Exits 1 beyond 10 %.
"""

from __future__ import annotations

import sys
import time

import torch

from evatool.core.batch import Batch
from evatool.distributed.engines.build import build_engine
from evatool.distributed.world import World
from evatool.model.clip import build_clip
from evatool.model.config import ModelConfig
from evatool.model.presets import resolve_preset
from evatool.objective.build import build_objective
from evatool.optim.build import build_optimizer
from evatool.optim.param_groups import build_param_groups
from evatool.plan.advice import step_sec
from evatool.plan.estimate import memory
from evatool.plan.hardware import Assumptions, hardware
from evatool.plan.job import PlannedJob
from evatool.plan.memory import GIB, Checkpointing
from evatool.recipe.schema import AdamWSection, EngineSection, GroupSection, InfoNceObjective

NUM_STEPS = 6
BOUND = 0.10
L14, BIG = resolve_preset("EVA02-CLIP-L-14"), resolve_preset("EVA-CLIP-18B")
CASES: list[tuple[str, ModelConfig, int, Checkpointing]] = [
    *((f"L/14, {batch}", L14, batch, "none") for batch in (64, 256)),
    *((f"L/14, {batch}, {kind}", L14, batch, kind) for batch in (256, 1024) for kind in ("selective", "full")),  # type: ignore[misc]
    *((f"18B, {depth} blocks", BIG.with_depth(depth), 64, "full") for depth in (1, 2, 4)),
]


def job_of_case(config: ModelConfig, batch: int, checkpointing: Checkpointing) -> PlannedJob:
    """Captions fill their context, so no text is left out."""
    kinds = {"numerics": "autocast", "engine": "single", "checkpointing": checkpointing}
    return PlannedJob("measured", "train-clip", config, (), batch * 1000, batch, 1, **kinds)  # type: ignore[arg-type]


def measured(config: ModelConfig, batch: int, checkpointing: Checkpointing, device: torch.device) -> tuple[int, float]:
    """(bytes at the peak, seconds a step)."""
    objective = build_objective(InfoNceObjective(), build_clip(config))
    section = AdamWSection(visual=GroupSection(lr=1e-4), text=GroupSection(lr=1e-4), other=GroupSection(lr=1e-4))
    groups = build_param_groups(
        objective.named_parameters(), section, depth_visual=config.depth, depth_text=config.text_depth
    )
    engine = build_engine(
        EngineSection(kind="single", activation_checkpointing=checkpointing),
        World(0, 1, 0, device),
        objective,
        groups,
        precision="bf16",
        grad_clip_norm=1.0,
        optimizer=build_optimizer(section, groups),
        bounds=objective.parameter_bounds,
    )
    objective.train()
    image = torch.randint(0, 256, (batch, 3, config.image_size, config.image_size), dtype=torch.uint8, device=device)
    tokens = torch.randint(1, 49406, (batch, config.context_length))
    tokens[:, -1] = 49407
    step = Batch(image, [""] * batch, tokens)
    start = 0.0
    for number in range(NUM_STEPS):
        if number == NUM_STEPS // 2:
            _wait(device)
            start = time.perf_counter()
        engine.set_lrs([1e-4 * group.lr_scale for group in groups])
        engine.backward(engine.forward(step)["loss"])
        engine.step()
    _wait(device)
    seconds = (time.perf_counter() - start) / (NUM_STEPS - NUM_STEPS // 2)
    return (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0), seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU here: peak memory is not compared")
        return 0
    gpu, device = hardware(sys.argv[1] if len(sys.argv) > 1 else "h100"), torch.device("cuda", 0)
    print("| case | planned, GiB | measured | off by | planned, s a step | measured |\n" + "| --- " * 6 + "|")
    worst = 0.0
    for name, config, batch, checkpointing in CASES:
        job = job_of_case(config, batch, checkpointing)
        parts = memory(job).parts
        said = sum(parts.values()) - parts["context"]
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        real, seconds = measured(config, batch, checkpointing, device)
        off = said / real - 1
        worst = max(worst, abs(off))
        planned = step_sec(job, gpu, Assumptions())
        print(f"| {name} | {said / GIB:.2f} | {real / GIB:.2f} | {off:+.1%} | {planned:.3f} | {seconds:.3f} |")
    return 0 if worst <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
