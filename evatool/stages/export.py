"""`evatool export`: a trained model as files that other libraries load, verified by opening them there."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

import evatool
from evatool.api import LoadedClip, load_clip
from evatool.export.model_card import CardFacts
from evatool.export.open_clip import export_open_clip
from evatool.recipe.schema import ExportRecipe
from evatool.stages.run_dir import RunOptions, open_run_dir
from evatool.types import Result

log = logging.getLogger(__name__)


def run(recipe: ExportRecipe, run: RunOptions) -> Result:
    """Export the recipe's model into the run folder itself; a resumed run writes it again.

    Raises: CheckpointError if the model cannot be read; EvatoolError if the reloaded export differs. Then no model
    file is left in the run folder.
    """
    run_dir = open_run_dir(recipe, run)
    section = recipe.export
    clip = load_clip(section.checkpoint)
    log.info("%s: %s, %s", section.checkpoint, clip.config.name, clip.source)
    exported = export_open_clip(
        clip,
        clip.open_clip_description(),
        card_facts(clip),
        run_dir.path,
        tolerance=section.tolerance,
        replace=run_dir.resumed,
    )
    parameters = sum(p.numel() for p in clip.model.parameters())
    size = sum((run_dir.path / name).stat().st_size for name in exported.files)
    return Result(
        stage="export",
        run_dir=run_dir.path,
        outputs={"model": run_dir.path} | {name: run_dir.path / name for name in exported.files},
        metrics={"max_difference": exported.difference, "parameters": parameters, "bytes": size},
        next_command=_open_command(clip, run_dir.path),
        table=[
            ["", ""],
            ["format", section.format],
            ["model", clip.config.name],
            ["parameters", f"{parameters:,}"],
            ["size", f"{size / 1e6:.1f} MB"],
            ["largest difference after reloading", f"{exported.difference:.1e}"],
        ],
    )


def _open_command(clip: LoadedClip, folder: Path) -> str:
    imports = "import open_clip"
    if clip.open_clip_description().needs_evatool:
        imports = "import evatool, open_clip; evatool.register()"
    code = f"{imports}; open_clip.create_model_from_pretrained('local-dir:{folder.resolve()}')"
    return f'python -c "{code}"' if not set(code) & set('"$`\\!') else f"python -c {shlex.quote(code)}"


def card_facts(clip: LoadedClip) -> CardFacts:
    """What the model card says: shape and size of `clip`, and the recipe found beside its weights."""
    config = clip.config
    assert config.text is not None, "load_clip returns CLIP models only"
    grid = f"{config.grid[0]} x {config.grid[1]}"
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    return CardFacts(
        name=config.name,
        source=clip.source,
        architecture=[
            ("image size, patch", f"{config.image_size}, {config.patch_size} (grid {grid})"),
            ("image tower: width, depth, heads", f"{config.width}, {config.depth}, {config.num_heads}"),
            ("image tower: blocks", _block_words(config.vision)),
            (
                "text tower: width, depth, heads",
                f"{config.text['width']}, {config.text['layers']}, {config.text['heads']}",
            ),
            ("context, vocabulary", f"{config.context_length}, {config.text['vocab_size']}"),
            ("embedding", str(config.embed_dim)),
            ("weights", str(next(clip.model.visual.parameters()).dtype).removeprefix("torch.")),
        ],
        parameters={"image": count(clip.model.visual), "text": count(clip.model.text), "temperature": 1},
        recipe_toml=_beside(Path(clip.source), "resolved.toml"),
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


def _beside(source: Path, name: str) -> str | None:
    path = source / name
    return path.read_text(encoding="utf-8") if path.is_file() else None
