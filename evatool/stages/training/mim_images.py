"""What a MIM student saw and how well it filled in the rest, as one picture."""

# K pictures, S input side in pixels, N patches

from __future__ import annotations

import html
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from evatool.core.atomic_io import write_bytes_atomically
from evatool.core.batch import Batch
from evatool.objective.mim import MimObjective, patch_cosine

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
CELL = 144  # pixels a drawn picture's side
GAP = 8
LABEL_WIDTH = 104
LEGEND_HEIGHT = 44
LEGEND_WIDTH = 360
HIDDEN_COLOR = (128, 128, 128)  # of a masked patch
INK = (40, 40, 40)
ROW_LABELS = (
    "picture",
    "what the\nstudent saw",
    "cosine to\nthe teacher",
    "student's\nfeatures",
    "teacher's\nfeatures",
)
# From 0 (dark) to 1 (light), in steps of a quarter; light enough in the middle to be told apart in grey too.
COLORS = np.array([(48, 18, 59), (86, 91, 165), (33, 145, 140), (122, 209, 81), (253, 231, 37)], dtype=np.float64)


@dataclass
class Look:
    """What there is to see of a few pictures, on the CPU."""

    image: Tensor  # (K, 3, S, S) uint8
    mask: Tensor  # (K, N) bool, N a square number of patches
    cosine: Tensor  # (K, N) float32 in [-1, 1], 0 where not masked
    student: Tensor  # (K, N, 3) in [0, 1]: the student's predictions in the colours of the teacher's features
    teacher: Tensor  # (K, N, 3) in [0, 1]; grey where its features are not known


@torch.no_grad()
def look_at(objective: MimObjective, batch: Batch) -> Look:
    """The student's predictions beside the teacher's features.

    Args:
        batch: on the objective's device, with features or the teacher's pictures.
    """
    assert batch.mask is not None
    was_training = objective.training
    objective.eval()
    prediction = objective.predict_all(batch)
    features, known = objective.known_features(batch)
    objective.train(was_training)
    mask = batch.mask
    cosine = torch.where(mask & known, patch_cosine(prediction, features).float(), 0.0)
    student, teacher = feature_colors(prediction.cpu(), features.cpu(), known.cpu())
    return Look(batch.image.cpu(), mask.cpu(), cosine.cpu(), student, teacher)


def feature_colors(student: Tensor, teacher: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Features (K, N, T) of both as RGB (K, N, 3) in [0, 1]: like colours are like features.

    The colours are the first three principal components of the teacher's features at unit length, as cosines see them.
    """
    units = [F.normalize(features.double(), dim=-1) for features in (student, teacher)]
    sample = units[1][known]
    mean = sample.mean(dim=0)
    directions = torch.linalg.svd(sample - mean, full_matrices=False).Vh[:3]
    largest = directions.abs().argmax(dim=1, keepdim=True)
    directions = directions * directions.gather(1, largest).sign()  # a component's sign is arbitrary: make it the same
    coordinates = (sample - mean) @ directions.T
    low, high = (torch.quantile(coordinates, share, dim=0) for share in (0.02, 0.98))
    colors = []
    for features in units:
        scaled = ((features - mean) @ directions.T - low) / (high - low).clamp_min(1e-12)
        colors.append(F.pad(scaled.clamp(0, 1), (0, 3 - len(directions)), value=0.5).float())
    colors[1][~known] = HIDDEN_COLOR[0] / 255
    return colors[0], colors[1]


def save_mim_images(path: Path, look: Look) -> None:
    """Write the sheet as a PNG, whole or not at all."""
    png = io.BytesIO()
    draw_sheet(look).save(png, format="PNG")
    path.parent.mkdir(exist_ok=True)
    write_bytes_atomically(path, png.getvalue())


def save_image_page(folder: Path, title: str) -> None:
    """`index.html` of all sheets `step_*.png` in a folder, the newest first."""
    names = sorted((path.name for path in folder.glob("step_*.png")), reverse=True)
    parts = [f"<h2>Step {int(name[5:-4]):,}</h2><img src='{name}' alt='{name}'>" for name in names]
    head = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
    style = "<style>body{font-family:sans-serif;margin:2rem;max-width:70rem}img{max-width:100%}</style>"
    told = (
        "<p>What the student saw, the cosine of its predictions at hidden patches, and its predictions beside the "
        "teacher's features: colours are three principal components of the teacher's, so like colours are like "
        "features.</p>"
    )
    page = f"{head}{style}<h1>{html.escape(title)}</h1>{told}{''.join(parts)}</html>"
    write_bytes_atomically(folder / "index.html", page.encode())


def draw_sheet(look: Look) -> Image.Image:
    """One column a picture, one row a thing to see, and a colour scale below; a cosine below 0 is drawn as 0."""
    mask, cosine = look.mask, look.cosine
    arrays = [part.numpy() for part in (look.image, mask, cosine, look.student, look.teacher)]
    columns = [_column(*parts) for parts in zip(*arrays, strict=True)]
    width = LABEL_WIDTH + max(LEGEND_WIDTH, len(columns) * (CELL + GAP))
    height = len(ROW_LABELS) * (CELL + GAP) + LEGEND_HEIGHT
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=14)
    for row, label in enumerate(ROW_LABELS):
        top = row * (CELL + GAP)
        draw.multiline_text((4, top + CELL // 2), label, fill=INK, font=font, anchor="lm")
        for column, cells in enumerate(columns):
            sheet.paste(cells[row], (LABEL_WIDTH + column * (CELL + GAP), top))
    _draw_legend(sheet, draw, font, top=height - LEGEND_HEIGHT + 4, mean=float(cosine[mask].mean()))
    return sheet


def _column(
    image: np.ndarray, mask: np.ndarray, cosine: np.ndarray, student: np.ndarray, teacher: np.ndarray
) -> list[Image.Image]:
    """The cells of one picture: (3, S, S) uint8, (N,) bool, (N,), (N, 3) and (N, 3)."""
    pixels = image.transpose(1, 2, 0)
    hidden = _per_pixel(mask, len(pixels))[..., None]
    seen = np.where(hidden, np.array(HIDDEN_COLOR), pixels)
    faded = 255 - (255 - pixels.astype(np.float64)) * 0.25  # context, without drawing the eye
    filled = np.where(hidden, colors_of(_per_pixel(cosine, len(pixels))), faded)
    # Enlarged without smoothing, so that patches stay sharp.
    how = Image.Resampling.NEAREST if len(pixels) <= CELL else Image.Resampling.BOX
    colors = [255 * _per_pixel(features, len(pixels)) for features in (student, teacher)]
    cells = (pixels, seen, filled, *colors)
    return [Image.fromarray(cell.astype(np.uint8)).resize((CELL, CELL), how) for cell in cells]


def _per_pixel(patches: np.ndarray, size: int) -> np.ndarray:
    """(N, ...) values of a square grid -> (S, S, ...)."""
    side = round(len(patches) ** 0.5)
    index = np.arange(size) * side // size
    return patches.reshape(side, side, *patches.shape[1:])[np.ix_(index, index)]


def colors_of(cosine: np.ndarray) -> np.ndarray:
    """Values in [0, 1] (others are clipped) -> RGB in a last axis of 3."""
    stops = np.linspace(0, 1, len(COLORS))
    return np.stack([np.interp(cosine, stops, channel) for channel in COLORS.T], axis=-1)


def _draw_legend(sheet: Image.Image, draw: ImageDraw.ImageDraw, font: Font, top: int, mean: float) -> None:
    bar_width = CELL
    bar = np.broadcast_to(colors_of(np.linspace(0, 1, bar_width)), (14, bar_width, 3)).astype(np.uint8)
    left = LABEL_WIDTH + 16
    draw.text((left - 12, top + 7), "0", fill=INK, font=font, anchor="lm")
    sheet.paste(Image.fromarray(bar), (left, top))
    draw.text(
        (left + bar_width + 4, top + 7), f"1   mean over masked patches: {mean:.2f}", fill=INK, font=font, anchor="lm"
    )
