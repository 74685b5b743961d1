"""Images [n, c, h, w] in [0, 1] -> pictures to look at: labelled sheets and animations, on no background, so that they fit any theme."""

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL, FILM, GAP, TEXT = 112, 168, 8, 19  # pixels: the least side of an image, also in a film, the space between two, the height of letters
INK = (125, 130, 140, 255)  # read on white and on black


def cells(images: Tensor, side: int = CELL) -> list[Image.Image]:
    """Each image with round corners; a small one is enlarged by a whole number, so that its pixels stay square."""
    factor = max(1, -(-side // max(images.shape[2:])))
    values = (images * 255).round().byte().expand(-1, 3 if images.shape[1] == 1 else -1, -1, -1).permute(0, 2, 3, 1).numpy()
    found = [
        Image.fromarray(value).resize((value.shape[1] * factor, value.shape[0] * factor), Image.Resampling.NEAREST) for value in values
    ]
    corners = Image.new("L", (found[0].width * 2, found[0].height * 2), 0)  # twice as large: its edge is smoothed by the way back
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, corners.width - 1, corners.height - 1), radius=16, fill=255)
    mask = corners.resize(found[0].size, Image.Resampling.LANCZOS)
    for image in found:
        image.putalpha(mask)
    return found


def sheet(images: Tensor, columns: int, rows: Sequence[str] = (), heads: Sequence[str] = (), side: int = CELL) -> Image.Image:
    """Images in rows of `columns`, with a name before each row and above each column where there are names."""
    pictures = cells(images, side)
    width, height = pictures[0].size
    font = ImageFont.load_default(TEXT)
    names = [_cut(name, font) for name in rows]
    left = max((round(font.getlength(name)) for name in names), default=-2 * GAP) + 2 * GAP
    top = TEXT + 2 * GAP if heads else 0
    lines = -(-len(pictures) // columns)
    page = Image.new("RGBA", (left + columns * (width + GAP) - GAP, top + lines * (height + GAP) - GAP))
    draw = ImageDraw.Draw(page)
    for i, picture in enumerate(pictures):
        page.paste(picture, (left + i % columns * (width + GAP), top + i // columns * (height + GAP)))
    for i, name in enumerate(names):
        draw.text((left - 2 * GAP, top + i * (height + GAP) + height // 2), name, fill=INK, font=font, anchor="rm")
    for i, name in enumerate(heads):
        draw.text((left + i * (width + GAP) + width // 2, TEXT // 2), name, fill=INK, font=font, anchor="mm")
    return page


def animation(images: Tensor, frames: int, columns: int) -> bytes:
    """A WebP that goes there and back for ever; images [frames * tiles, ...], those of a frame side by side. It rests at both ends."""
    tiles = len(images) // frames
    there = [sheet(images[i * tiles : (i + 1) * tiles], columns, side=FILM) for i in range(frames)]
    loop = [*there, *there[-2:0:-1]]
    last = {0, frames - 1}
    durations = [500 if i in last else 50 for i in range(len(loop))]  # milliseconds
    file = io.BytesIO()
    how = (
        {"lossless": True, "quality": 0, "method": 0} if max(images.shape[2:]) < FILM else {"quality": 85, "method": 2}
    )  # squares stay sharp
    loop[0].save(file, "WEBP", save_all=True, append_images=loop[1:], duration=durations, loop=0, **how)
    return file.getvalue()


def _cut(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, most: int = 170) -> str:
    """The first of several names, as much of it as fits."""
    name = name.split(",")[0]
    while len(name) > 1 and font.getlength(name) > most:
        name = name[:-2].rstrip() + "…"
    return name
