"""`evatool export`: a trained model as files that other libraries load, verified by opening them there."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

import evatool
from evatool.core.errors import UsageError
from evatool.eval.report.wording import main_rows
from evatool.eval.results import read_results
from evatool.export.folder import Target
from evatool.export.hub import check_credentials, push_to_hub
from evatool.export.model_card import CardFacts
from evatool.inference.loaded_clip import DTYPES, LoadedClip, load_clip
from evatool.model.config import ModelConfig
from evatool.recipe.schema import ExportRecipe, ExportSection
from evatool.runs.result import Result
from evatool.runs.run_dir import RunOptions, open_run_dir
from evatool.stages.exporting import deepspeed as export_deepspeed
from evatool.stages.exporting.formats import export_model, round_weights
from evatool.stages.exporting.streamed import export_unloaded, needs_streaming
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
    run_dir = open_run_dir(recipe, run)
    target = Target(run_dir.path, section.tolerance, replace=run_dir.resumed)
    unloaded = find_model(section)
    dtype = DTYPES[section.dtype] if section.dtype else unloaded.stored_dtype
    log.info("%s: %s, %s", section.checkpoint, unloaded.config.name, unloaded.source)
    if needs_streaming(unloaded, section):
        log.info("written tensor by tensor, verified block by block")
        facts = card_facts(unloaded, dtype)
        exported = export_unloaded(unloaded, section, dtype, facts, target)
    else:
        clip = load_model(section)
        results = [] if section.results is None else _results(section.results, clip)
        round_to(clip, section)
        facts = card_facts(unloaded, dtype, results)
        exported = export_model(clip, section, facts, target)
    address = {} if section.push_to_hub is None else {"hub": push_to_hub(exported, section.push_to_hub)}
    parameters = sum(facts.parameters.values())
    size = sum((run_dir.path / name).stat().st_size for name in exported.files)
    return Result(
        stage="export",
        run_dir=run_dir.path,
        outputs={"model": run_dir.path} | {name: run_dir.path / name for name in exported.files},
        metrics={"max_difference": exported.difference, "parameters": parameters, "bytes": size} | address,
        next_command=_next_command(unloaded.config, section, run_dir.path),
        table=[
            ["", ""],
            ["format", section.format],
            ["model", unloaded.config.name],
            ["parameters", f"{parameters:,} ({_plain_name(dtype)})"],
            ["size", f"{size / 1e6:.1f} MB"],
            ["largest difference after reloading", f"{exported.difference:.1e}"],
        ],
    )


def find_model(section: ExportSection) -> UnloadedClip:
    """The model to export, on disk. Raises: UsageError for a preset: it has no weights to export."""
    if not Path(section.checkpoint).expanduser().exists():
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
    )


def load_model(section: ExportSection) -> LoadedClip:
    """The model to export, resized as the section says."""
    return load_clip(
        section.checkpoint,
        model_config=section.model,
        image_size=section.image_size,
        patch_size=section.patch_size,
        patch_resize=section.patch_resize or "bicubic",
    )


def round_to(clip: LoadedClip, section: ExportSection) -> None:
    """Give the weights the values that they will have where the export is read; arithmetic stays float32."""
    dtype = DTYPES[section.dtype] if section.dtype else clip.stored_dtype
    is_resized = section.image_size is not None or section.patch_size is not None
    if dtype != clip.stored_dtype or is_resized:
        round_weights(clip, dtype)


def _next_command(config: ModelConfig, section: ExportSection, folder: Path) -> str:
    """Open what was written, in the library it was written for."""
    where = folder.resolve()
    register = "import evatool; evatool.register(); " if config.vision["use_rms_norm"] else ""
    match section.format:
        case "open_clip":
            code = f"{register}import open_clip; open_clip.create_model_from_pretrained('local-dir:{where}')"
        case "timm":
            code = f"{register}import timm; timm.create_model('local-dir:{where}', pretrained=True)"
        case "onnx":
            code = f"import onnxruntime; onnxruntime.InferenceSession('{where}/{section.tower or 'image'}.onnx')"
        case "torch-export":
            code = f"import torch; torch.export.load('{where}/{section.tower or 'image'}.pt2')"
        case "baai" | "safetensors":
            code = f"import evatool; evatool.load_clip('{where}')"
    return f'python -c "{code}"' if not set(code) & set('"$`\\!') else f"python -c {shlex.quote(code)}"


def card_facts(clip: UnloadedClip, dtype: torch.dtype, results: Sequence[tuple[str, str]] = ()) -> CardFacts:
    """What the model card says: shape and size of `clip`, the recipe found beside its weights, and `results`."""
    config = clip.config
    assert config.text is not None, "exports are of CLIP models only"
    text = config.text
    count = lambda prefix: sum(math.prod(clip.tensors.shape(n)) for n in clip.tensors if n.startswith(prefix))  # noqa: E731
    return CardFacts(
        name=config.name,
        source=clip.source,
        architecture=[
            (
                "image size, patch, grid",
                f"{config.image_size}, {config.patch_size}, {config.grid[0]} x {config.grid[1]}",
            ),
            ("image tower: width, depth, heads", f"{config.width}, {config.depth}, {config.num_heads}"),
            ("image tower: blocks", _block_words(config.vision)),
            ("text tower: width, depth, heads", f"{text['width']}, {text['layers']}, {text['heads']}"),
            ("context, vocabulary", f"{config.context_length}, {text['vocab_size']}"),
            ("embedding", str(config.embed_dim)),
            ("weights", _plain_name(dtype)),
        ],
        parameters={"image": count("visual."), "text": count("text."), "temperature": 1},
        recipe_toml=_beside(Path(clip.source), "resolved.toml"),
        results=results,
        evatool_version=evatool.__version__,
    )


def _block_words(vision: dict) -> str:
    if vision["tower"] == "clip-vit":
        return f"OpenAI's ViT, MLP ratio {vision['mlp_ratio']:.4g}"
    words = [
        "post-norm" if vision["postnorm"] else "pre-norm",
        "RMSNorm" if vision["use_rms_norm"] else "LayerNorm",
        "SwiGLU" if vision["naiveswiglu"] or vision["swiglu"] else "GELU",
        f"MLP ratio {vision['mlp_ratio']:.4g}",
        *(["sub-LN"] if vision["subln"] else []),
        *(["RoPE"] if vision["rope"] else []),
        "q and v biases" if vision["qkv_bias"] else "no q/k/v biases",
    ]
    return ", ".join(words)


def _plain_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _beside(source: Path, name: str) -> str | None:
    path = source / name
    return path.read_text(encoding="utf-8") if path.is_file() else None


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
    show = lambda row: f"{100 * row.value:.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}]"  # noqa: E731
    return [(f"{row.variant}, {row.metric}, % (chance {100 * row.chance:.2g})", show(row)) for row in rows]
