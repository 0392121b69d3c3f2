"""The browser of a round's pairs: win beside lose, to be filtered by category, side and score."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from hermesflow.models.model import Model
from hermesflow.report.markup import document, picture
from hermesflow.runtime.files import write_text

NUM_PAIRS = 200
"""At most; more would make the page too heavy to open."""
_BATCH, _LARGEST_PIXELS = 8, 128
_SCRIPT = """
const rows = [...document.querySelectorAll("article")];
const read = name => document.getElementById(name).value;
function show() {
  const category = read("category"), side = read("side"), least = Number(read("win")), most = Number(read("lose"));
  let count = 0;
  for (const row of rows) {
    const own = row.dataset, scores = [[own.imageWin, own.imageLose], [own.captionWin, own.captionLose]];
    const chosen = side === "" ? scores : [scores[side === "generation" ? 0 : 1]];
    const fits = (category === "" || own.category === category)
      && chosen.some(([win, lose]) => win !== "" && Number(win) >= least && Number(lose) <= most);
    row.hidden = !fits;
    count += fits;
  }
  document.getElementById("count").textContent = `${count} of ${rows.length} pairs`;
}
document.querySelector("form").addEventListener("input", show);
show();
"""


def write_browser(pairs: pa.Table, number: int, model: Model, path: Path) -> Path:
    """Writes the page.

    Args:
        pairs: of the round, with PAIRS_SCHEMA; NUM_PAIRS of them at equal distances are shown.
        number: the round.
        model: decodes the images.
        path: of the page.
    Returns: the path.
    Raises: InputError if it cannot be written.
    """
    step = max(1, -(-len(pairs) // NUM_PAIRS))
    rows = pairs.to_pylist()[::step]
    articles = [
        article for start in range(0, len(rows), _BATCH) for article in _articles(rows[start : start + _BATCH], model)
    ]
    which = f"{len(rows)} of {len(pairs)}, at equal distances" if len(rows) < len(pairs) else f"all {len(pairs)}"
    body = f"""<header><p class="over">HermesFlow</p><h1>Pairs of round {number}</h1>
<p class="note">{which}. Images: win and lose, drawn of the prompt; captions likewise, of the record's own image beside
them. Below stand their scores.</p></header>
{_form(rows)}
<div class="split">{"".join(articles)}</div>
<script>{_SCRIPT}</script>"""
    write_text(path, document(f"Pairs of round {number} - HermesFlow", body))
    return path


def _form(rows: Sequence[dict[str, Any]]) -> str:
    categories = "".join(
        f'<option value="{escape(name)}">{escape(name.replace("_", " "))}</option>'
        for name in sorted({row["category"] for row in rows})
    )
    return f"""<form class="filters">
<label>category <select id="category"><option value="">all</option>{categories}</select></label>
<label>side <select id="side"><option value="">both</option><option>generation</option>
<option>understanding</option></select></label>
<label>win's score from <input id="win" type="number" value="0" min="0" max="1" step="0.05"></label>
<label>lose's score to <input id="lose" type="number" value="1" min="0" max="1" step="0.05"></label>
<output id="count">{len(rows)} pairs</output></form>"""


def _articles(rows: Sequence[dict[str, Any]], model: Model) -> list[str]:
    keys = ("win_codes", "lose_codes", "record_codes")
    wanted = [row[key] for row in rows for key in keys if row[key] is not None]
    pixels = iter(model.decode_images(torch.tensor(wanted, dtype=torch.int64)))
    images = [{key: next(pixels) for key in keys if row[key] is not None} for row in rows]
    return [_article(row, drawn) for row, drawn in zip(rows, images, strict=True)]


def _article(row: dict[str, Any], images: dict[str, np.ndarray]) -> str:
    figures = ""
    for key, role, score in (("win_codes", "win", "win_image_score"), ("lose_codes", "lose", "lose_image_score"),
                             ("record_codes", "own", "")):  # fmt: skip
        if key in images:
            told = f" {row[score]:.2f}" if score and row[score] is not None else ""
            image = picture(_small(images[key]), f"{role} image: {row['caption']}")
            figures += (
                f'<figure class="{role}">{image}<figcaption><b class="mark">{role}</b>{told}</figcaption></figure>'
            )
    captions = "".join(
        f'<li class="{role}"><b class="mark">{role}</b><span>{escape(row[f"{role}_caption"])} '
        f'<span class="score">{row[f"{role}_caption_score"]:.2f}</span></span></li>'
        for role in ("win", "lose")
        if row[f"{role}_caption"] is not None
    )
    data = {f"{kind}-{role}": row[f"{role}_{kind}_score"] for kind in ("image", "caption") for role in ("win", "lose")}
    scores = "".join(f' data-{name}="{"" if value is None else value}"' for name, value in data.items())
    return f"""<article class="card" data-category="{escape(row["category"])}"{scores}>
<header><h3>{escape(row["caption"])}</h3><p class="over">{escape(row["category"].replace("_", " "))},
{escape(row["record_id"])}</p></header><div class="images">{figures}</div>
<ul class="captions">{captions}</ul></article>"""


def _small(pixels: np.ndarray) -> np.ndarray:
    image = Image.fromarray(pixels)
    image.thumbnail((_LARGEST_PIXELS, _LARGEST_PIXELS))
    return np.asarray(image)
