"""An export is opened again by the library it was made for, in a process of its own, and must give our features."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from evatool.errors import EvatoolError
from evatool.tensorfile import SafetensorsMap, write_safetensors

# B pictures or captions, S input side in pixels, L text tokens

# Run by the fresh process: argv is the exported folder, the inputs and where the outputs go.
# `evatool` is made impossible to import unless the export says that it needs it.
_OPEN_CLIP_READER = """
import sys
folder, inputs, outputs, needs_evatool = sys.argv[1:]
if needs_evatool == "yes":
    import evatool
    evatool.register()
else:
    sys.modules["evatool"] = None
import open_clip, torch
from PIL import Image
from safetensors.torch import load_file, save_file
given = load_file(inputs)
model, preprocess = open_clip.create_model_from_pretrained("local-dir:" + folder)
model.eval()
picture = Image.fromarray(given["picture"].numpy())
with torch.no_grad():
    save_file({
        "image_features": model.encode_image(given["image"]).contiguous(),
        "text_features": model.encode_text(given["tokens"]).contiguous(),
        "logit_scale": model.logit_scale.exp().reshape(1),
        "preprocessed": preprocess(picture).contiguous(),
    }, outputs)
"""


def fixed_inputs(image_size: int, context_length: int, vocab_size: int) -> dict[str, Tensor]:
    """The same inputs for every verification: `image` (4, 3, S, S) float, `tokens` (4, L), `picture` (H, W, 3) uint8.

    Token rows have different lengths; each ends with the vocabulary's last id, as CLIP's do, and is zero-padded.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(4, 3, image_size, image_size, generator=generator)
    tokens = torch.randint(1, vocab_size - 1, (4, context_length), generator=generator)
    for row, length in enumerate(torch.linspace(2, context_length, 4).long().tolist()):
        tokens[row, length - 1] = vocab_size - 1
        tokens[row, length:] = 0
    picture = torch.randint(0, 256, (image_size + 17, 2 * image_size + 5, 3), generator=generator, dtype=torch.uint8)
    return {"image": image, "tokens": tokens, "picture": picture}


def open_clip_outputs(folder: Path, inputs: Mapping[str, Tensor], *, needs_evatool: bool) -> dict[str, Tensor]:
    """What stock open_clip makes of `inputs` with the folder's model, in a fresh process and without the network.

    Returns: `image_features`, `text_features`, `logit_scale` (exponentiated) and `preprocessed`, all float32.
    Raises: EvatoolError with the other process's last words if it fails.
    """
    with tempfile.TemporaryDirectory(prefix="evatool-verify-") as scratch:
        asked, answered = Path(scratch, "inputs.safetensors"), Path(scratch, "outputs.safetensors")
        write_safetensors(asked, inputs)
        arguments = [str(folder.resolve()), str(asked), str(answered), "yes" if needs_evatool else "no"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, "-c", _OPEN_CLIP_READER, *arguments],
            cwd=scratch,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0 or not answered.is_file():
            last_words = "\n".join(done.stderr.strip().splitlines()[-4:])
            raise EvatoolError(
                f"open_clip could not open the export:\n{last_words}",
                where=str(folder),
                fix="this is a fault of the export; please report it with the model's configuration",
            )
        outputs = SafetensorsMap(answered)
        return {name: outputs[name] for name in outputs}


def relative_difference(theirs: Tensor, ours: Tensor) -> float:
    """||theirs - ours|| / ||ours|| over all elements, in float64."""
    ours = ours.detach().double().cpu()
    return float((theirs.double() - ours).norm() / ours.norm())


def largest_difference(
    theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], tolerance: float, where: Path
) -> float:
    """The largest relative difference over the tensors of `ours`.

    Raises: EvatoolError naming every tensor beyond `tolerance`, or of another shape, or not finite.
    """
    differences: dict[str, float] = {}
    for name, tensor in ours.items():
        same_shape = name in theirs and theirs[name].shape == tensor.shape
        differences[name] = relative_difference(theirs[name], tensor) if same_shape else float("inf")
    beyond = {name: value for name, value in differences.items() if not value <= tolerance}
    if beyond:
        listed = ", ".join(f"{name} {value:.2e}" for name, value in beyond.items())
        raise EvatoolError(
            f"the reloaded export differs from the model: {listed}",
            where=str(where),
            expected=f"at most {tolerance:.0e} (relative L2)",
            fix="nothing was written; a larger export.tolerance accepts it",
        )
    return max(differences.values())
