"""What a MIM student saw and how well it filled in the rest, as one picture."""

# K pictures, S input side in pixels, N patches

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from evatool.data.shards import write_file
from evatool.objective.mim import MimObjective, patch_cosine
from evatool.types import Batch

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
CELL = 144  # pixels a drawn picture's side
GAP = 8
LABEL_WIDTH = 104
LEGEND_HEIGHT = 44
LEGEND_WIDTH = 360
HIDDEN_COLOR = (128, 128, 128)  # of a masked patch
INK = (40, 40, 40)
ROW_LABELS = ("picture", "what the\nstudent saw", "cosine to\nthe teacher")
# From 0 (dark) to 1 (light), in steps of a quarter; light enough in the middle to be told apart in grey too.
COLORS = np.array([(48, 18, 59), (86, 91, 165), (33, 145, 140), (122, 209, 81), (253, 231, 37)], dtype=np.float64)


@torch.no_grad()
def masked_cosines(objective: MimObjective, batch: Batch) -> Tensor:
    """Cosine between the student's prediction and the teacher's feature, (K, N) float32, 0 where not masked.

    Args:
        batch: on the objective's device.
    """
    was_training = objective.training
    objective.eval()
    prediction, target = objective.predict(batch)
    objective.train(was_training)
    assert batch.mask is not None
    cosine = torch.zeros(batch.mask.shape, device=batch.mask.device)
    cosine[batch.mask] = patch_cosine(prediction, target).float()
    return cosine


def save_mim_pictures(path: Path, batch: Batch, cosine: Tensor) -> None:
    """Write the sheet of a batch and its `masked_cosines` as a PNG, whole or not at all."""
    assert batch.mask is not None
    sheet = draw_sheet(batch.image.cpu(), batch.mask.cpu(), cosine.cpu())
    png = io.BytesIO()
    sheet.save(png, format="PNG")
    write_file(path, png.getvalue())


def draw_sheet(image: Tensor, mask: Tensor, cosine: Tensor) -> Image.Image:
    """One column a picture, three rows, and a colour scale below.

    Args:
        image: (K, 3, S, S) uint8.
        mask: (K, N) bool, N a square number of patches.
        cosine: (K, N) in [-1, 1], shown where masked; below 0 is drawn as 0.
    """
    columns = [_column(*parts) for parts in zip(image.numpy(), mask.numpy(), cosine.numpy(), strict=True)]
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


def _column(image: np.ndarray, mask: np.ndarray, cosine: np.ndarray) -> list[Image.Image]:
    """The three cells of one picture: (3, S, S) uint8, (N,) bool, (N,)."""
    pixels = image.transpose(1, 2, 0)
    hidden = _per_pixel(mask, len(pixels))[..., None]
    seen = np.where(hidden, np.array(HIDDEN_COLOR), pixels)
    faded = 255 - (255 - pixels.astype(np.float64)) * 0.25  # context, without drawing the eye
    filled = np.where(hidden, colors_of(_per_pixel(cosine, len(pixels))), faded)
    # Enlarged without smoothing, so that patches stay sharp.
    how = Image.Resampling.NEAREST if len(pixels) <= CELL else Image.Resampling.BOX
    return [Image.fromarray(cell.astype(np.uint8)).resize((CELL, CELL), how) for cell in (pixels, seen, filled)]


def _per_pixel(patches: np.ndarray, size: int) -> np.ndarray:
    """(N,) values of a square grid -> (S, S)."""
    side = round(len(patches) ** 0.5)
    index = np.arange(size) * side // size
    return patches.reshape(side, side)[np.ix_(index, index)]


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
