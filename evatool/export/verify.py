"""An export is opened again by the library it was made for and must give our features."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from evatool.core.errors import EvatoolError
from evatool.export.folder import Target
from evatool.formats.safetensors import SafetensorsMap, write_safetensors
from evatool.inference.loaded_clip import LoadedClip

# B images or captions, S input side in pixels, L text tokens

# What a fresh process runs before a reader: argv is the exported folder, the inputs, where the outputs go, and whether
# evatool is needed. Where it is not, it is made impossible to import.
_PRELUDE = """
import sys
folder, inputs, outputs, needs_evatool = sys.argv[1:]
if needs_evatool == "yes":
    import evatool
    evatool.register()
else:
    sys.modules["evatool"] = None
import torch
from safetensors.torch import load_file, save_file
given = load_file(inputs)
"""

OPEN_CLIP_READER = """
import open_clip
from PIL import Image
model, preprocess = open_clip.create_model_from_pretrained("local-dir:" + folder)
model.eval()
picture = Image.fromarray(given["picture"].numpy())
with torch.no_grad():
    save_file({
        "image_features": model.encode_image(given["image"], normalize=False).contiguous(),
        "text_features": model.encode_text(given["tokens"], normalize=False).contiguous(),
        "logit_scale": model.logit_scale.exp().reshape(1),
        "preprocessed": preprocess(picture).contiguous(),
        **({} if getattr(model, "logit_bias", None) is None else {"logit_bias": model.logit_bias.reshape(1)}),
    }, outputs)
"""

TIMM_READER = """
import timm
model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
with torch.no_grad():
    save_file({"image_features": model(given["image"]).contiguous()}, outputs)
"""


TRANSFORMERS_READER = """
from transformers import AutoModel, AutoTokenizer
model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
plain = lambda output: getattr(output, "pooler_output", output).contiguous()
with torch.no_grad():
    save_file({
        "image_features": plain(model.get_image_features(pixel_values=given["image"])),
        "text_features": plain(model.get_text_features(input_ids=given["tokens"])),
        "logit_scale": model.logit_scale.exp().reshape(1),
        "ids": tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids,
    }, outputs)
"""


def fixed_inputs(image_size: int | tuple[int, int], context_length: int, vocab_size: int) -> dict[str, Tensor]:
    """Fixed inputs for verification: `image` (4, 3, H, W) float, `tokens` (4, L), `picture` (H, W, 3) uint8.

    Token rows have different lengths; each ends with the vocabulary's last id, as CLIP's do, and is zero-padded.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    image = torch.randn(4, 3, height, width, generator=generator)
    tokens = torch.randint(1, vocab_size - 1, (4, context_length), generator=generator)
    for row, length in enumerate(torch.linspace(2, context_length, 4).long().tolist()):
        tokens[row, length - 1] = vocab_size - 1
        tokens[row, length:] = 0
    raw_image = torch.randint(0, 256, (height + 17, 2 * width + 5, 3), generator=generator, dtype=torch.uint8)
    return {"image": image, "tokens": tokens, "picture": raw_image}


def our_outputs(clip: LoadedClip, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of the model itself for `fixed_inputs`, under the names that the readers use."""
    bias = getattr(clip.model, "logit_bias", None)
    outputs = {} if bias is None else {"logit_bias": bias.detach().reshape(1)}
    return outputs | {
        "image_features": clip.encode_image(inputs["image"]),
        "text_features": clip.encode_text(inputs["tokens"]),
        "logit_scale": clip.model.logit_scale.detach().exp().reshape(1),
        "preprocessed": clip.preprocess(Image.fromarray(inputs["picture"].numpy())),
    }


def foreign_outputs(
    reader: str, folder: Path, inputs: Mapping[str, Tensor], *, needs_evatool: bool = False
) -> dict[str, Tensor]:
    """Outputs of another library for `inputs` with the folder's model, in a fresh process and without the network.

    Args:
        reader: one of this module's programs.
    Raises: EvatoolError with the other process's last words if it fails.
    """
    with tempfile.TemporaryDirectory(prefix="evatool-verify-") as scratch:
        given_path, made_path = Path(scratch, "inputs.safetensors"), Path(scratch, "outputs.safetensors")
        write_safetensors(given_path, inputs)
        arguments = [str(folder.resolve()), str(given_path), str(made_path), "yes" if needs_evatool else "no"]
        environment = os.environ | {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, "-c", _PRELUDE + reader, *arguments],
            cwd=scratch,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0 or not made_path.is_file():
            last_words = "\n  ".join(done.stderr.strip().splitlines()[-4:])
            raise EvatoolError(
                f"the other library could not open the export:\n  {last_words}",
                where=str(folder),
                fix="this is a fault of the export; please report it with the model's configuration",
            )
        outputs = SafetensorsMap(made_path)
        return {name: outputs[name] for name in outputs}


def relative_difference(theirs: Tensor, ours: Tensor) -> float:
    """||theirs - ours|| / ||ours|| over all elements, in float64."""
    ours = ours.detach().double().cpu()
    return float((theirs.detach().double().cpu() - ours).norm() / ours.norm())


def largest_difference(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], target: Target) -> float:
    """The largest relative difference over the tensors of `ours`.

    Raises: EvatoolError naming every tensor beyond the target's tolerance, or of another shape, or not finite.
    """
    differences: dict[str, float] = {}
    for name, tensor in ours.items():
        same_shape = name in theirs and theirs[name].shape == tensor.shape
        differences[name] = relative_difference(theirs[name], tensor) if same_shape else float("inf")
    beyond = {name: value for name, value in differences.items() if not value <= target.tolerance}
    if beyond:
        listed = ", ".join(f"{name} {value:.2e}" for name, value in beyond.items())
        raise EvatoolError(
            f"the reloaded export differs from the model: {listed}",
            where=str(target.folder),
            expected=f"at most {target.tolerance:.0e} (relative L2)",
            fix="nothing was written; a larger export.tolerance accepts it",
        )
    return max(differences.values())


def refuse_different_tensors(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], where: Path) -> None:
    """Every tensor must have come back with the same bits. Raises: EvatoolError naming those that have not."""
    changed = sorted(set(theirs) ^ set(ours))
    changed += [name for name in ours if name in theirs and not _same_bits(theirs[name], ours[name])]
    if changed:
        raise EvatoolError(
            f"{len(changed)} tensors of the reloaded export differ: {', '.join(changed[:6])}",
            where=str(where),
            fix="nothing was written; please report it with the model's configuration",
        )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
