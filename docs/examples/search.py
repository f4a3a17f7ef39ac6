"""Find images by words: `python docs/examples/search.py MODEL FOLDER "what to look for" [HOW_MANY]`.

    python docs/examples/search.py runs/demo/distill photos "a red apple on a table" 5

The features of the folder are kept beside its images (`.evatool-features.pt`), so that only the first search waits.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image

import evatool

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def features_of(clip: evatool.LoadedClip, folder: Path) -> tuple[list[str], torch.Tensor]:
    """Names of the folder's images, and their features (N, E) at unit length."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    names = [str(path.relative_to(folder)) for path in paths]
    kept = folder / ".evatool-features.pt"
    if kept.exists():
        found = torch.load(kept, weights_only=True)
        # The fingerprint is of configuration and weights: features of another model are not taken for this one's.
        if found["names"] == names and found["model"] == clip.fingerprint:
            return names, found["features"]
    rows = []
    for start in range(0, len(paths), 64):
        images = [clip.preprocess(Image.open(path)) for path in paths[start : start + 64]]
        rows.append(clip.encode_image(torch.stack(images), normalize=True))
    features = torch.cat(rows)
    torch.save({"names": names, "model": clip.fingerprint, "features": features}, kept)
    return names, features


def main(model: str, folder: str, query: str, how_many: str = "5") -> None:
    clip = evatool.load_clip(model)
    names, features = features_of(clip, Path(folder))
    asked = clip.encode_text(clip.tokenizer([query]), normalize=True)[0]
    similarity = features @ asked
    for index in similarity.argsort(descending=True)[: int(how_many)].tolist():
        print(f"{similarity[index]:.3f}  {names[index]}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
