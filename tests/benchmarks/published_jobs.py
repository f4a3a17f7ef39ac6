"""The published runs as jobs."""

from __future__ import annotations

from evatool.model.presets import resolve_preset
from evatool.plan.job import PlannedJob
from evatool.plan.published import PublishedRun


def job_of(run: PublishedRun, num_gpus: int | None = None) -> PlannedJob:
    """As published: DeepSpeed's 16-bit engine and block checkpointing."""
    return PlannedJob(
        name=run.name,
        stage="train-clip",
        model=resolve_preset(run.preset),
        teachers=(),
        samples_seen=run.samples_seen,
        global_batch_size=run.per_gpu * run.num_gpus,
        num_gpus=num_gpus or run.num_gpus,
        numerics="bf16",
        engine="deepspeed",
        zero_stage=run.zero_stage,
        checkpointing="full",
        patch_dropout=run.patch_dropout,
    )
