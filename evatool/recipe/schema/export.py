"""The recipe of an export. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from evatool.recipe.schema.base import Positive, PositiveFloat, Section

Format = Literal["open_clip", "baai", "timm", "safetensors", "onnx", "torch-export", "transformers", "deepspeed"]


class ExportSection(Section):
    """The model to export, and the files to write."""

    checkpoint: str
    """Model to export, as `evatool.load_clip` reads it: a run folder, a checkpoint folder or a released file."""
    model: str | None = None
    """Architecture of a weight file that no preset fits: a preset's name, or a JSON file with `embed_dim`, `vision_cfg`
    and `text_cfg`. Most files need none."""
    weights: str | None = None
    """Which of several models in a file is exported: `raw`, `ema` for the moving average, or the prefix of its names.
    When absent, a checkpoint's raw weights, and of other files the average where one stands beside the weights."""
    format: Format = "open_clip"
    """Form of the written files. `open_clip` is a folder that open_clip loads as `local-dir:`. `baai` is one file under
    EVA-CLIP's names. `timm` is the image tower alone. `safetensors` is one file under evatool's names. `onnx` and
    `torch-export` are a graph for each tower that takes any batch size. `transformers` is a folder of its `CLIPModel`,
    or in BAAI's layout for models like EVA-CLIP-8B and 18B. `deepspeed` is a training checkpoint with its moments, as
    DeepSpeed's universal one."""
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """Numbers of the written weights. They are as at the source when absent. `fp16` and `bf16` halve the files. With
    `onnx`, `fp16` is also what the graphs compute in; what that changes is reported as with `quantize`."""
    image_size: Positive | None = None
    """Input side in pixels, where it is to differ from the model's; the position embeddings are resized."""
    patch_size: Positive | None = None
    """Side of a patch in pixels, where it is to differ from the model's; the patch kernel and the position embeddings
    are resized."""
    patch_resize: Literal["bicubic", "pseudo-inverse"] | None = None
    """How the patch kernel is resized, only with `patch_size`. `bicubic` is used when absent, as EVA's scripts do;
    `pseudo-inverse` is FlexiViT's way, which keeps the features of upsampled pictures."""
    tower: Literal["image", "text"] | None = None
    """Tower to write alone, for `onnx`, `torch-export`, `safetensors` and `baai`. Both are written when absent; `timm`
    is always the image tower."""
    opset: Annotated[int, Field(ge=18)] | None = None
    """ONNX operator set, only with `format = "onnx"`. It is 20 when absent. Lower it for an older runtime."""
    quantize: Literal["int8"] | None = None
    """Whether the weights of matrix products become 8-bit numbers, only with `format = "onnx"`. The files shrink to
    about a quarter, and features change a little: how much is measured on `agreement_images` and reported."""
    agreement_images: Path | None = None
    """Folder of pictures, only with an `onnx` of `quantize` or of `dtype = "fp16"`: the features of graph and model are
    compared on the first 1,000. They are compared on noise when absent, which says less."""
    streamed: bool | None = None
    """Whether tensors are written one by one without loading the model, and verified block by block (`open_clip`,
    `baai` and `safetensors`). When absent this is done where the float32 model does not fit the free memory."""
    push_to_hub: str | None = None
    """Repository on the Hugging Face hub, as `owner/name`, to which the verified files are uploaded. Nothing is
    uploaded when it is absent."""
    results: Path | None = None
    """`results.json` of an evaluation whose figures are written to the model card. The card has none when it is absent.
    """
    tolerance: PositiveFloat = 1e-5
    """Largest relative L2 difference between evatool's features and those of the reloaded files. A larger difference
    leaves no files. Raise it only where you know where the difference comes from."""

    @property
    def arithmetic(self) -> Literal["fp32", "fp16", "int8"]:
        """What the written ONNX graphs compute in; other formats hold weights alone."""
        if self.format != "onnx":
            return "fp32"
        return self.quantize or ("fp16" if self.dtype == "fp16" else "fp32")

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> ExportSection:
        if self.opset is not None and self.format != "onnx":
            raise ValueError(f"opset = {self.opset} has no effect: format = {self.format!r} is not 'onnx'")
        if self.quantize is not None and self.format != "onnx":
            raise ValueError(f"quantize = {self.quantize!r} has no effect: format = {self.format!r} is not 'onnx'")
        if self.quantize is not None and self.dtype == "fp16":
            raise ValueError("quantize = 'int8' and dtype = 'fp16' are two precisions: choose one")
        if self.agreement_images is not None and self.arithmetic == "fp32":
            raise ValueError("agreement_images has no effect without quantize or dtype = 'fp16' in an 'onnx' export")
        if self.patch_resize is not None and self.patch_size is None:
            raise ValueError(f"patch_resize = {self.patch_resize!r} has no effect without patch_size")
        if self.format in ("open_clip", "transformers") and self.tower is not None:
            raise ValueError(f"tower = {self.tower!r}: a folder of {self.format} holds both towers")
        if self.format == "timm" and self.tower == "text":
            raise ValueError("tower = 'text': timm has image towers only")
        if self.format == "deepspeed":
            # A written recipe holds the defaults too: only what differs from them was asked for.
            fields = type(self).model_fields
            others = (name for name in fields if name not in ("checkpoint", "format"))
            given = sorted(name for name in others if getattr(self, name) != fields[name].default)
            if given:
                raise ValueError(f"{', '.join(given)}: format = 'deepspeed' writes a training checkpoint as it is")
        return self


class ExportRecipe(Section):
    """Writes a trained model as files that other libraries load, and verifies them by reloading them there."""

    stage: Literal["export"] = "export"
    """Stage that this recipe is for. The commands of other stages refuse it."""
    source: str | None = None
    """Text that says where the values of this recipe come from. It is shown by `evatool recipe list` and changes
    nothing."""
    run_dir: Path | None = None
    """Folder to write. It is `runs/<recipe name>` when absent."""
    export: ExportSection
    """Model to export, and the form of its files."""
