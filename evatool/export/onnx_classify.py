"""Zero-shot classification with the ONNX files beside this script, without torch or evatool.

    python classify.py image.jpg other.png --labels "a cat" "a dog"
    python classify.py image.jpg --labels cat dog --templates "a photo of a {}." "a drawing of a {}."

It needs onnxruntime, numpy, pillow and tokenizers. `ftfy.zip` beside it holds ftfy, which repairs captions as in
training, under its own licence.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

# B images or captions, E features, L text tokens, H and W input sides in pixels


class Package:
    """The towers, preprocessing and scores of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        self.input = json.loads((folder / "preprocessor.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.start, self.end = (self.tokenizer.token_to_id(self.scores[key]) for key in ("start_token", "end_token"))
        self.fix_text = load_ftfy(folder)
        self.sessions: dict[str, Any] = {}

    def run(self, tower: str, batch: np.ndarray) -> np.ndarray:
        """Features (B, E) of unit length."""
        if tower not in self.sessions:
            path = str(self.folder / f"{tower}.onnx")
            self.sessions[tower] = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
        features: np.ndarray = self.sessions[tower].run(["features"], {"input": batch})[0]
        return np.asarray(features / np.linalg.norm(features, axis=-1, keepdims=True))

    def clean(self, text: str) -> str:
        """A caption as the model was trained on it: repaired, without entities, one space between words, lower case."""
        unescaped = html.unescape(html.unescape(self.fix_text(text)))
        return " ".join(unescaped.split()).strip().lower()

    def tokens(self, texts: list[str]) -> np.ndarray:
        """Ids (B, L) int64, zero-padded; a long caption is cut and keeps its end token."""
        length = self.scores["context_length"]
        rows = np.zeros((len(texts), length), np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = self.tokenizer.encode(self.clean(text), add_special_tokens=False).ids[: length - 2]
            row[: len(ids) + 2] = [self.start, *ids, self.end]
        return rows

    def pixels(self, image: Image.Image) -> np.ndarray:
        """A picture as (3, H, W) float32, resized, cropped and normalised."""
        image = image.convert("RGB")
        height, width = self.input["size"]
        filter = Image.Resampling[self.input["interpolation"].upper()]
        if self.input["resize"] == "squash":
            image = image.resize((width, height), filter)
        elif self.input["resize"] == "longest":
            ratio = max(image.width / width, image.height / height)
            image = image.resize((round(image.width / ratio), round(image.height / ratio)), filter)
            filled = Image.new("RGB", (width, height), (self.input["fill"],) * 3)
            filled.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
            image = filled
        else:
            side = min(height, width)
            short, long = sorted(image.size)
            other = int(side * long / short)
            sides = (side, other) if image.width <= image.height else (other, side)
            image = image.resize(sides, filter) if image.size != sides else image
            left, top = round((sides[0] - width) / 2), round((sides[1] - height) / 2)
            image = image.crop((left, top, left + width, top + height))
        values = np.asarray(image, np.float32) / np.float32(255)
        mean, std = (np.array(self.input[key], np.float32) for key in ("mean", "std"))
        return np.ascontiguousarray(((values - mean) / std).transpose(2, 0, 1))

    def label_features(self, labels: list[str], templates: list[str]) -> np.ndarray:
        """(labels, E): of each label the mean over the templates, at unit length."""
        means = [self.run("text", self.tokens([t.replace("{}", label) for t in templates])).mean(0) for label in labels]
        features = np.stack(means)
        return np.asarray(features / np.linalg.norm(features, axis=-1, keepdims=True))

    def probabilities(self, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """(B, labels): the sigmoid of each pair for a model with a bias, else the softmax over the labels."""
        logits = self.scores["logit_scale"] * images.astype(np.float64) @ texts.T.astype(np.float64)
        if self.scores["logit_bias"] is not None:
            return np.asarray(1 / (1 + np.exp(-(logits + self.scores["logit_bias"]))))
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def load_ftfy(folder: Path) -> Any:
    """The function that repairs text, of the ftfy that this model's captions were made with."""
    # ftfy's table layout, which is not used here, would import wcwidth.
    if "wcwidth" not in sys.modules:
        stand_in: Any = types.ModuleType("wcwidth")
        stand_in.wcwidth = stand_in.wcswidth = None
        sys.modules["wcwidth"] = stand_in
    sys.path.insert(0, str(folder / "ftfy.zip"))
    try:
        import ftfy
    finally:
        sys.path.pop(0)
    return ftfy.fix_text


def main() -> None:
    """Print each image's labels, the likeliest first."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--labels", nargs="+", required=True)
    parser.add_argument("--templates", nargs="+", default=["a photo of a {}."], help="texts with {} for the label")
    parser.add_argument("--json", action="store_true", help="one object with the probability of every label")
    asked = parser.parse_args()
    package = Package(Path(__file__).resolve().parent)
    texts = package.label_features(asked.labels, asked.templates)
    table = {}
    for path in asked.images:
        with Image.open(path) as image:
            features = package.run("image", package.pixels(image)[None])
        values = package.probabilities(features, texts)[0]
        ranked = sorted(zip(asked.labels, values.tolist(), strict=True), key=lambda pair: -pair[1])
        table[str(path)] = dict(ranked)
        if not asked.json:
            print(path, *(f"  {value:8.2%}  {label}" for label, value in ranked), sep="\n")
    if asked.json:
        print(json.dumps(table, ensure_ascii=False, indent=2))


if __name__ == "__main__":
    main()
