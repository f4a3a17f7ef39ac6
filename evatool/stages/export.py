"""`evatool export`: a trained model as files that other libraries load, verified by opening them there."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

from evatool.core.errors import UsageError
from evatool.core.own_folder import expand_user
from evatool.eval.report.wording import main_rows
from evatool.eval.results import read_results
from evatool.export.folder import Target
from evatool.export.formats import build_exporter
from evatool.export.hub import check_credentials, push_to_hub
from evatool.export.model_card import card_facts, dtype_name
from evatool.export.streamed import export_streamed
from evatool.export.written import round_weights
from evatool.inference.loaded_clip import DTYPES, LoadedClip, load_clip
from evatool.recipe.schema import ExportRecipe, ExportSection
from evatool.runs.result import Result
from evatool.runs.run_dir import RunOptions, open_run_dir
from evatool.stages.exporting import deepspeed as export_deepspeed
from evatool.stages.exporting.streamed import needs_streaming
from evatool.weights.load import UnloadedClip, find_clip

log = logging.getLogger(__name__)


def run(recipe: ExportRecipe, run: RunOptions) -> Result:
    """Export the recipe's model into the run folder itself; a resumed run writes it again.

    Raises: CheckpointError if the model cannot be read; EvatoolError if the reloaded export differs. Then no model
    file is left in the run folder.
    """
    section = recipe.export
    if section.format == "deepspeed":
        return export_deepspeed.run(recipe, run)
    if section.push_to_hub is not None:
        check_credentials(section.push_to_hub)
    exporter = build_exporter(
        section.format,
        tower=section.tower,
        opset=section.opset,
        precision=section.arithmetic,
        images=section.agreement_images,
    )
    run_dir = open_run_dir(recipe, run)
    target = Target(run_dir.path, section.tolerance, replace=run_dir.resumed, check_owner=run_dir.check_owner)
    unloaded = find_model(section)
    dtype = DTYPES[section.dtype] if section.dtype else unloaded.stored_dtype
    log.info("%s: %s, %s", section.checkpoint, unloaded.config.name, unloaded.source)
    if needs_streaming(unloaded, section, exporter):
        log.info("written tensor by tensor, verified block by block")
        facts = card_facts(unloaded, dtype)
        layout = exporter.streamed_format(unloaded, facts, target)
        assert layout is not None, f"{section.format} cannot be written tensor by tensor"
        exported = export_streamed(layout, unloaded, dtype, target)
    else:
        clip = load_model(section)
        results = [] if section.results is None else _results(section.results, clip)
        round_to(clip, section)
        facts = card_facts(unloaded, dtype, results)
        exported = exporter.export(clip, facts, target)
    address = {} if section.push_to_hub is None else {"hub": push_to_hub(exported, section.push_to_hub)}
    agreement = {
        f"agreement/{tower}/{name}": value
        for tower in ("image", "text")
        for name, value in exported.agreement.get(tower, {}).items()
    }
    parameters = sum(facts.parameters.values())
    size = sum((run_dir.path / name).stat().st_size for name in exported.files)
    return Result(
        stage="export",
        run_dir=run_dir.path,
        outputs={"model": run_dir.path} | {name: run_dir.path / name for name in exported.files},
        metrics={"max_difference": exported.difference, "parameters": parameters, "bytes": size} | agreement | address,
        next_command=_shell_command(exporter.loading_code(unloaded.config, run_dir.path.resolve())),
        table=[
            ["", ""],
            ["format", section.format],
            ["model", unloaded.config.name],
            ["parameters", f"{parameters:,} ({dtype_name(dtype)})"],
            ["size", f"{size / 1e6:.1f} MB"],
            ["largest difference after reloading", f"{exported.difference:.1e}"],
            *([name.replace("/", ", ").replace("_", " "), f"{value:.4f}"] for name, value in agreement.items()),
        ],
    )


def find_model(section: ExportSection) -> UnloadedClip:
    """The model to export, on disk. Raises: UsageError for a preset: it has no weights to export."""
    if not expand_user(section.checkpoint).exists():
        raise UsageError(
            f"there is no model at {section.checkpoint!r}",
            where="export.checkpoint",
            expected="a run folder, a checkpoint, or a file or folder of a published model",
        )
    return find_clip(
        section.checkpoint,
        model_config=section.model,
        image_size=section.image_size,
        patch_size=section.patch_size,
        patch_resize=section.patch_resize or "bicubic",
        weights=section.weights,
    )


def load_model(section: ExportSection) -> LoadedClip:
    """The model to export, resized as the section says."""
    return load_clip(
        section.checkpoint,
        model_config=section.model,
        image_size=section.image_size,
        patch_size=section.patch_size,
        patch_resize=section.patch_resize or "bicubic",
        weights=section.weights,
    )


def round_to(clip: LoadedClip, section: ExportSection) -> None:
    """Give the weights the values that they will have where the export is read; arithmetic stays float32."""
    if section.arithmetic == "fp16":
        return  # the graph's own conversion rounds: what that changes is measured against the weights as they are
    dtype = DTYPES[section.dtype] if section.dtype else clip.stored_dtype
    is_resized = section.image_size is not None or section.patch_size is not None
    if dtype != clip.stored_dtype or is_resized:
        round_weights(clip, dtype)


def _shell_command(code: str) -> str:
    """A line for the shell that runs `code`."""
    return f'python -c "{code}"' if not set(code) & set('"$`\\!') else f"python -c {shlex.quote(code)}"


def _results(path: Path, clip: LoadedClip) -> list[tuple[str, str]]:
    """The main figures of `clip` in an evaluation's `results.json`, told by the weights' fingerprint."""
    results = read_results(path)
    names = {record.name for record in results.models if record.fingerprint == clip.fingerprint}
    rows = [row for row in main_rows(results) if row.model in names]
    if not rows:
        raise UsageError(
            f"none of the {len(results.models)} models evaluated in this file has the weights of {clip.source}",
            where=f"export.results = {path}",
            expected="the results.json of an evaluation of these very weights, neither resized nor trained further",
            fix="run evatool eval on this model, or leave export.results out",
        )
    return [
        (
            f"{row.variant}, {row.metric}, % (chance {100 * row.chance:.2g})",
            f"{100 * row.value:.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}]",
        )
        for row in rows
    ]
