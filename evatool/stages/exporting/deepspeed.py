"""A training checkpoint for people who go on in DeepSpeed: `evatool export` with `format = "deepspeed"`."""

from __future__ import annotations

from evatool.checkpoint.layout import MODEL_PREFIX
from evatool.checkpoint.load import latest_checkpoint, load_checkpoint
from evatool.core.errors import UsageError
from evatool.core.own_folder import expand_user
from evatool.export.deepspeed_universal import WRITTEN_FOR, write_universal
from evatool.recipe.schema import ExportRecipe
from evatool.runs.result import Result
from evatool.runs.run_dir import RunOptions, open_run_dir
from evatool.weights.mapped_tensors import renamed_tensors


def run(recipe: ExportRecipe, run: RunOptions) -> Result:
    """Write the checkpoint as DeepSpeed's universal one into the run folder.

    Raises: UsageError where there is no training checkpoint; CheckpointError where it is damaged.
    """
    source = expand_user(recipe.export.checkpoint)
    path = source if (source / "MANIFEST.json").is_file() else latest_checkpoint(source) if source.is_dir() else None
    if path is None:
        raise UsageError(
            f"there is no training checkpoint at {recipe.export.checkpoint!r}",
            where="export.checkpoint",
            expected="the run folder of a training stage, or one of its checkpoints/step_*",
            fix="exports of weights alone have no optimiser state: name the run they came from",
        )
    saved = load_checkpoint(path)
    run_dir = open_run_dir(recipe, run)
    files = write_universal(
        run_dir.path,
        path.name,
        weights=renamed_tensors(saved.objective_state, {_plain(name): name for name in saved.objective_state}),
        moments=renamed_tensors(saved.optimizer_state, {_plain_moment(name): name for name in saved.optimizer_state}),
        groups=[group | {"parameters": [_plain(name) for name in group["parameters"]]} for group in saved.groups],
        step=saved.step,
        samples_seen=saved.train_state["samples_seen"],
        num_updates=int(saved.optimizer_state["num_updates"]),
    )
    size = sum(file.stat().st_size for file in files)
    return Result(
        stage="export",
        run_dir=run_dir.path,
        outputs={"checkpoint": run_dir.path / path.name},
        metrics={"step": saved.step, "files": len(files), "bytes": size},
        next_command=f"engine.load_checkpoint({str(run_dir.path.resolve())!r})",
        table=[
            ["", ""],
            ["format", f"DeepSpeed universal checkpoint ({WRITTEN_FOR})"],
            ["step", str(saved.step)],
            ["configuration needs", '"checkpoint": {"load_universal": true}'],
            ["size", f"{size / 1e6:.1f} MB"],
        ],
    )


def _plain(name: str) -> str:
    return name.removeprefix(MODEL_PREFIX)


def _plain_moment(name: str) -> str:
    moment, dot, parameter = name.partition(f".{MODEL_PREFIX}")
    return f"{moment}.{parameter}" if dot else name
