"""Name what is in images, with any model that evatool reads: `python docs/examples/classify.py MODEL LABELS IMAGE...`.

    python docs/examples/classify.py runs/demo/distill "cat,dog,red apple" photo.jpg

MODEL is a run folder, a checkpoint, an exported folder or a released file. LABELS are separated by commas.
"""

from __future__ import annotations

import sys

import torch
from PIL import Image

import evatool


def main(model: str, labels: str, *paths: str) -> None:
    names = labels.split(",")
    clip = evatool.load_clip(model)
    # Each class is the feature of its caption, each image is compared with all of them.
    text = clip.encode_text(clip.tokenizer([f"a picture of a {name}" for name in names]), normalize=True)
    images = torch.stack([clip.preprocess(Image.open(path)) for path in paths])
    similarity = clip.encode_image(images, normalize=True) @ text.T  # (B, C) cosines
    probabilities = (clip.logit_scale * similarity).softmax(dim=-1)
    for path, row in zip(paths, probabilities, strict=True):
        best = int(row.argmax())
        print(f"{path}: {names[best]} ({row[best]:.0%})")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
