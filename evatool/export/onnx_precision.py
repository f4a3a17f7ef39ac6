"""ONNX graphs in fewer bits, and how far their features then are from the model's own on given images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from evatool.core.errors import UsageError
from evatool.inference.loaded_clip import LoadedClip

OnnxPrecision = Literal["fp32", "fp16", "int8"]

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_MOST_IMAGES = 1000
_BATCH = 16

# B images, E embedding


def tidy_graph(path: Path) -> None:
    """Name the axis of any length `batch`, and drop what the file says twice of its weights, in place.

    The exporter writes the shape of a matrix as it was before it was folded into the graph transposed; onnxruntime's
    own quantisation reads that and stops.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.value_info if value.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    symbol = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if symbol and dim.dim_param:
                dim.dim_param = dim.dim_param.replace(symbol, "batch")
    onnx.save(model, path)


def reduce_precision(path: Path, precision: OnnxPrecision) -> None:
    """Rewrite a float32 graph in fewer bits, in place; its input and output stay float32.

    fp16: all of its arithmetic. int8: the weights of matrix products, and the token table, by unsigned 8-bit numbers
    with a scale for each output, and activations by numbers found for each batch as it comes.
    """
    if precision == "fp32":
        return
    reduced = path.with_name(f"reduced-{path.name}")
    if precision == "fp16":
        import onnx
        from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

        # These stay float32: norms are computed so everywhere in evatool, and onnxruntime 1.31 ends in a segmentation
        # fault where its CPU optimiser meets a float16 norm and Gelu.
        kept = [*DEFAULT_OP_BLOCK_LIST, "LayerNormalization", "Gelu"]
        model = onnx.load(path)
        model = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=True, op_block_list=kept)
        large = model.ByteSize() > 1.5e9
        onnx.save(model, reduced, save_as_external_data=large, location=f"{path.name}.data")
    else:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        large = path.with_name(f"{path.name}.data").exists()
        quantize_dynamic(
            path,
            reduced,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            per_channel=True,
            weight_type=QuantType.QUInt8,  # products of two unsigned numbers cannot overflow on older processors
            use_external_data_format=large,
        )
    if not large:
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    reduced.replace(path)


def agreement(folder: Path, clip: LoadedClip, towers: Sequence[str], images: Path | None) -> dict[str, Any]:
    """How well the written graphs agree with the model: cosines of features, and choices that stay.

    Args:
        folder: with the graphs.
        images: a folder of pictures, at most 1,000 of which are taken in order of their names; noise when None.
    Returns: `images`, their number, and for each tower `cosine_min` and `cosine_mean`; for images also `nearest_kept`,
        the share whose most similar other image is the same as before.
    Raises: UsageError where the folder holds no picture.
    """
    from evatool.inference.onnx_package import GRAPHS, OnnxTower

    found: dict[str, Any] = {"images": 0 if images is None else len(_image_files(images))}
    for tower in towers:
        run = OnnxTower(folder / GRAPHS["visual" if tower == "image" else "text"])
        batches = _image_batches(clip, images) if tower == "image" else _caption_batches(clip)
        encode = clip.encode_image if tower == "image" else clip.encode_text
        pairs = [(encode(batch), run(batch).float()) for batch in batches]
        ours, theirs = (F.normalize(torch.cat(side), dim=-1) for side in zip(*pairs, strict=True))
        cosines = (ours * theirs).sum(dim=-1)
        found[tower] = {"cosine_min": float(cosines.min()), "cosine_mean": float(cosines.mean())}
        if tower == "image" and len(ours) > 2:
            found[tower]["nearest_kept"] = float((_nearest(ours, ours) == _nearest(theirs, theirs)).float().mean())
    return found


def _nearest(queries: Tensor, gallery: Tensor) -> Tensor:
    """Of each image the most similar other one."""
    return (queries @ gallery.T).fill_diagonal_(-2).argmax(dim=-1)


def _image_files(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGES and path.is_file())
    if not paths:
        raise UsageError(
            "this folder holds no picture to compare features on",
            where=f"export.agreement_images = {folder}",
            expected=f"files ending in {', '.join(_IMAGES)}",
            fix="name another folder, or leave export.agreement_images out",
        )
    return paths[:_MOST_IMAGES]


def _image_batches(clip: LoadedClip, images: Path | None) -> list[Tensor]:
    if images is None:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(_BATCH, 3, clip.image_size, clip.image_size, generator=generator)]
    pixels = []
    for path in _image_files(images):
        with Image.open(path) as opened:
            pixels.append(clip.preprocess(opened.convert("RGB")))
    return list(torch.stack(pixels).split(_BATCH))


def _caption_batches(clip: LoadedClip) -> list[Tensor]:
    things = ("a dog", "two cats", "a red car", "the sea at night", "a drawing of a house", "food on a plate")
    return [clip.tokenizer([template.format(thing) for thing in things]) for template in ("{}", "a photo of {}.")]
