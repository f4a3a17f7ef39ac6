"""The recipe of an export. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from evatool.recipe.schema.base import Positive, PositiveFloat, Section

Format = Literal["open_clip", "baai", "timm", "safetensors", "onnx", "torch-export", "deepspeed"]


class ExportSection(Section):
    """What to write."""

    checkpoint: str
    """Model to export, as `evatool.load_clip` reads it: run folder, checkpoint folder or released file."""
    model: str | None = None
    """The model of a file that no preset fits: a preset, or a JSON file with embed_dim, vision_cfg and text_cfg."""
    format: Format = "open_clip"
    """`open_clip`: a folder for `local-dir:`. `baai`: a flat file with EVA-CLIP's names. `timm`: the image tower.
    `safetensors`: our names in one file. `onnx`, `torch-export`: a graph a tower, any batch size. `deepspeed`: a
    training checkpoint with its moments, as DeepSpeed's universal one."""
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """Numbers of the written weights; as at the source when absent."""
    image_size: Positive | None = None
    """Input side in pixels where it differs from the model's; positions are resized."""
    patch_size: Positive | None = None
    """Patch side in pixels where it differs from the model's; the patch kernel and positions are resized."""
    patch_resize: Literal["bicubic", "pseudo-inverse"] | None = None
    """How a patch kernel is resized: as EVA's scripts do (when absent), or FlexiViT's way. Only with `patch_size`."""
    tower: Literal["image", "text"] | None = None
    """Only this tower (`onnx`, `torch-export`, `safetensors`, `baai`); `timm` is always the image tower."""
    opset: Annotated[int, Field(ge=18)] | None = None
    """ONNX operator set; 20 when absent. Only with `onnx`."""
    streamed: bool | None = None
    """Write tensor by tensor without loading the model, and verify block by block (`open_clip`, `baai`, `safetensors`).
    When absent: if the float32 model does not fit the free memory."""
    push_to_hub: str | None = None
    """Repository on the Hugging Face hub, `owner/name`, to upload the verified files to."""
    results: Path | None = None
    """`results.json` of an evaluation, for the model card."""
    tolerance: PositiveFloat = 1e-5
    """Largest relative L2 difference between our features and the reloaded export's."""

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> ExportSection:
        if self.opset is not None and self.format != "onnx":
            raise ValueError(f"opset = {self.opset} has no effect: format = {self.format!r} is not 'onnx'")
        if self.patch_resize is not None and self.patch_size is None:
            raise ValueError(f"patch_resize = {self.patch_resize!r} has no effect without patch_size")
        if self.format == "open_clip" and self.tower is not None:
            raise ValueError(f"tower = {self.tower!r}: an open_clip folder holds both towers")
        if self.format == "timm" and self.tower == "text":
            raise ValueError("tower = 'text': timm has image towers only")
        if self.format == "deepspeed":
            given = sorted(self.model_fields_set - {"checkpoint", "format"})
            if given:
                raise ValueError(f"{', '.join(given)}: format = 'deepspeed' writes a training checkpoint as it is")
        return self


class ExportRecipe(Section):
    """A trained model as files that other libraries load; verified by reloading it there."""

    stage: Literal["export"] = "export"
    source: str | None = None
    """Where the figures of this recipe come from."""
    run_dir: Path | None = None
    """Output folder; `runs/<recipe name>` when absent."""
    export: ExportSection
