"""A picture of pictures with their captions, to see at a glance what a model is going to learn from."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evatool.core.atomic_io import write_bytes_atomically

COLUMNS = 10
CELL_WIDTH, PICTURE_SIDE = 128, 96  # pixels
MARGIN, GAP = 20, 10
CAPTION_SIZE, NOTE_SIZE = 12, 10
CAPTION_LINES = 2
PAPER, CARD, EDGE, INK, FAINT = "#f4f4f2", "#ffffff", "#e2e2de", "#1c1c1c", "#7a7a76"


@dataclass(frozen=True)
class Entry:
    """A picture uint8 (H, W, 3), its caption, and a small note below it (a set or file name)."""

    pixels: np.ndarray
    caption: str
    note: str = ""


def draw_contact_sheet(entries: Sequence[Entry], path: Path) -> None:
    """Write the sheet as PNG."""
    columns = max(1, min(COLUMNS, len(entries)))
    rows = -(-len(entries) // columns)
    line = CAPTION_SIZE + 4
    cell_height = 8 + PICTURE_SIDE + 8 + CAPTION_LINES * line + NOTE_SIZE + 10
    width = 2 * MARGIN + columns * CELL_WIDTH + (columns - 1) * GAP
    height = 2 * MARGIN + rows * cell_height + (rows - 1) * GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, entry in enumerate(entries):
        row, column = divmod(i, columns)
        left, top = MARGIN + column * (CELL_WIDTH + GAP), MARGIN + row * (cell_height + GAP)
        box = (left, top, left + CELL_WIDTH - 1, top + cell_height - 1)
        draw.rounded_rectangle(box, radius=6, fill=CARD, outline=EDGE)
        image = _fit(entry.pixels)
        sheet.paste(image, (left + (CELL_WIDTH - image.width) // 2, top + 8 + (PICTURE_SIDE - image.height) // 2))
        text_top = top + 8 + PICTURE_SIDE + 8
        lines = _wrap(entry.caption, _font(CAPTION_SIZE), CELL_WIDTH - 12, CAPTION_LINES)
        for number, text in enumerate(lines):
            place = (left + CELL_WIDTH / 2, text_top + number * line)
            draw.text(place, text, fill=INK, font=_font(CAPTION_SIZE), anchor="ma")
        note = _wrap(entry.note, _font(NOTE_SIZE), CELL_WIDTH - 12, 1)
        place = (left + CELL_WIDTH / 2, top + cell_height - 10)
        draw.text(place, note[0] if note else "", fill=FAINT, font=_font(NOTE_SIZE), anchor="ms")
    out = io.BytesIO()
    sheet.save(out, "PNG")
    write_bytes_atomically(path, out.getvalue())


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) at the size the sheet shows, so that a large picture need not be kept."""
    return np.asarray(_fit(pixels))


def _fit(pixels: np.ndarray) -> Image.Image:
    image = Image.fromarray(pixels)
    scale = PICTURE_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """`text` in at most `max_lines` lines no wider than `width` pixels; what does not fit ends in an ellipsis."""
    words, lines = " ".join(text.split()).split(" "), [""]
    for number, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        elif len(lines) < max_lines and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = " ".join([lines[-1], *words[number:]]).strip()
            break
    return [line for line in (_shorten(line, font, width) for line in lines) if line]


def _shorten(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1].rstrip()
    return line + "…"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # brings DejaVu Sans along: Latin, Greek, Cyrillic and more, on every machine

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
