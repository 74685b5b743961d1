"""Pictures of `drifting-diffusers sample`: a grid of labels and seeds, and files that say what they are."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

SIDE, GAP, LINE, PAD = 96, 2, 20, 8  # pixels: small images are enlarged to about this side; between images; a line of text; beside names
MOST_COLUMNS, WIDEST_NAME = 12, 180
INK, PAPER = (40, 40, 40), (255, 255, 255)


def save_picture(image: Image.Image, file: Path, notes: Mapping[str, str]) -> None:
    """Whole or not at all, with what it is in its metadata."""
    file.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    for key, text in notes.items():
        if text:
            info.add_text(key, text)
    aside = file.with_name(file.name + ".partial")
    image.save(aside, format="PNG", pnginfo=info)
    aside.replace(file)


def seed_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], seeds: Sequence[int]) -> Image.Image:
    """A row for every label, its name on the left; of many images a block of rows. Small images are enlarged without smoothing."""
    count = len(seeds)
    columns = count if count <= MOST_COLUMNS else math.ceil(math.sqrt(count))
    first = rows[0][1][0]
    factor = max(1, round(SIDE / max(first.size)))
    width, height = first.width * factor + GAP, first.height * factor + GAP
    font = ImageFont.load_default(size=14)
    left = min(WIDEST_NAME, max(math.ceil(font.getlength(name)) for name, _ in rows)) + 2 * PAD if rows[0][0] else GAP
    top = LINE if columns == count > 1 else GAP
    deep = math.ceil(count / columns)
    page = Image.new("RGB", (left + columns * width, top + len(rows) * deep * height), PAPER)
    draw = ImageDraw.Draw(page)
    if top == LINE:
        for x, seed in enumerate(seeds):
            draw.text((left + x * width + width // 2, LINE // 2), _cut(font, f"seed {seed}", width), fill=INK, font=font, anchor="mm")
    for y, (name, images) in enumerate(rows):
        upper = top + y * deep * height
        draw.text((left - PAD, upper + height // 2), _cut(font, name, WIDEST_NAME), fill=INK, font=font, anchor="rm")
        for i, image in enumerate(images):
            enlarged = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
            page.paste(enlarged, (left + i % columns * width, upper + i // columns * height))
    return page


def _cut(font: Any, text: str, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
