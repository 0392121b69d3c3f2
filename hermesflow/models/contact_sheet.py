"""A contact sheet: many pictures with their captions on one."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_LEAST_SIDE = 128
_MOST_WIDTH = 4096
_MARGIN = 8
_CAPTION_LINES = 4
_BACKGROUND, _INK = (236, 236, 236), (40, 40, 40)


def draw_contact_sheet(pictures: Sequence[np.ndarray], captions: Sequence[str], columns: int) -> Image.Image:
    """Lay out pictures row by row, each with its caption below.

    Args:
        pictures: uint8 [H, W, 3], at least one; a shorter side below 128 pixels is enlarged by a whole factor.
        captions: one a picture; wrapped, and cut with "…" after four lines.
        columns: pictures in a row; fewer where the sheet would be wider than 4096 pixels.
    Returns: RGB.
    """
    images = [_enlarge(Image.fromarray(picture)) for picture in pictures]
    width, height = (max(sides) for sides in zip(*(image.size for image in images), strict=True))
    columns = max(1, min(columns, len(images), _MOST_WIDTH // (width + _MARGIN)))
    font = ImageFont.load_default(size=min(20, max(12, width // 20)))
    texts = [_wrap(caption, font, width) for caption in captions]
    line_height = sum(font.getmetrics())
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    heights = [height + line_height * max(len(texts[index]) for index in row) + 2 * _MARGIN for row in rows]

    sheet = Image.new("RGB", (columns * (width + _MARGIN) + _MARGIN, sum(heights) + _MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for row, row_height in zip(rows, heights, strict=True):
        for column, index in enumerate(row):
            left = _MARGIN + column * (width + _MARGIN)
            sheet.paste(images[index], (left, top))
            for number, line in enumerate(texts[index]):
                draw.text((left, top + height + _MARGIN // 2 + number * line_height), line, fill=_INK, font=font)
        top += row_height
    return sheet


def _enlarge(image: Image.Image) -> Image.Image:
    factor = -(-_LEAST_SIDE // min(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines that fit the width; a word that alone does not fit is broken."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
        if len(lines) > _CAPTION_LINES:
            break
    if len(lines) > _CAPTION_LINES:
        lines = lines[:_CAPTION_LINES]
        while font.getlength(lines[-1] + "…") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "…"
    return lines
