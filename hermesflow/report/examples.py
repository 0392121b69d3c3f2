"""The pairs of a round with all their candidates, as the report shows them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from hermesflow.data.pairs import read_pairs
from hermesflow.models.images import resize_images
from hermesflow.models.model import Model
from hermesflow.report.markup import details, picture, scrolling
from hermesflow.runtime.files import InputError, read_parquet
from hermesflow.worlds import oracle, shapes

NUM_SHOWN = 10
"""Records whose candidates are shown."""


@dataclass(frozen=True)
class Shown:
    """A pair with all candidates of its record."""

    pair: dict[str, Any]
    images: list[dict[str, Any]]
    """Rows of a candidates table, best first, with "pixels" uint8 [H, W, 3] and "answers" as a list."""
    captions: list[dict[str, Any]]
    real_pixels: np.ndarray


def drawings_section(rows: Sequence[tuple[dict[str, Any], dict[str, Any]]], number: int, model: Model) -> str:
    """What the measurement drew of its first prompts, before self-play and after a round, as a section of the page.

    Args:
        rows: of the built-in evaluation (before, after), with "prompt", "codes" [n][N] and "drawn".
        number: the round.
        model: decodes the images.
    Raises: InputError on codes that are none of the model's.
    """
    articles = "".join(
        f'<article class="record card"><header><h3>{escape(str(old["prompt"]))}</h3></header><div class="split">'
        f"<div><h4>Before self-play</h4>{_drawings(old, model)}</div>"
        f"<div><h4>After round {number}, same seeds</h4>{_drawings(new, model)}</div></div></article>"
        for old, new in rows
    )
    return f"""<section><h2>Drawings before and after</h2>
<p class="note">The first prompts of the measurement, not chosen by their results. Below each image stands how many of
the prompt's questions the oracle answers as the prompt says.</p>
{articles}</section>"""


def _drawings(row: dict[str, Any], model: Model) -> str:
    try:
        images = model.decode_images(torch.tensor(row["codes"], dtype=torch.int64))
        pairs = list(zip(images, row["drawn"], strict=True))
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"evaluation.json: what was drawn of {row['prompt']!r:.80} cannot be shown ({error})"
        ) from error
    figures = ""
    for pixels, digits in pairs:
        caption = f"{digits.count('1')} of {len(digits)} right"
        role = "wrong" if "0" in digits else "right"
        figures += f'<figure class="{role}">{picture(pixels, caption)}<figcaption>{caption}</figcaption></figure>'
    return f'<div class="images">{figures}</div>'


def choose_shown(round_folder: Path, model: Model) -> list[Shown]:
    """The first pairs of each category in turn, so that what is shown is not chosen by its result.

    Args:
        round_folder: holds pairs.parquet and candidates.
        model: decodes the images.
    Returns: at most NUM_SHOWN.
    Raises: InputError if a file is damaged.
    """
    by_category: dict[str, list[dict]] = {}
    for pair in read_pairs(round_folder / "pairs.parquet").to_pylist():
        by_category.setdefault(pair["category"], []).append(pair)
    turns = range(max(map(len, by_category.values()), default=0))
    pairs = [items[turn] for turn in turns for items in by_category.values() if turn < len(items)][:NUM_SHOWN]
    rows: dict[str, list[dict]] = {pair["record_id"]: [] for pair in pairs}
    for part in sorted((round_folder / "candidates").glob("part-*.parquet")):
        table = read_parquet(part)
        for row in table.filter(pc.is_in(table["record_id"], pa.array(rows, pa.string()))).to_pylist():
            rows[row["record_id"]].append(row)
    return [_load_shown(pair, rows[pair["record_id"]], model) for pair in pairs]


def _load_shown(pair: dict[str, Any], rows: list[dict[str, Any]], model: Model) -> Shown:
    images = [row for row in rows if row["kind"] != "caption"]
    codes = [row["token_ids"] for row in images] + [pair["record_codes"]]
    *pixels, real_pixels = model.decode_images(torch.tensor(codes, dtype=torch.int64))
    images = [
        row | {"pixels": picture, "answers": json.loads(row["answers"])}
        for row, picture in zip(images, pixels, strict=True)
    ]
    images.sort(key=lambda row: (row["kind"] != "image", -row["score"], row["index"]))
    captions = sorted((row for row in rows if row["kind"] == "caption"), key=lambda row: (-row["score"], row["index"]))
    return Shown(pair, images, captions, real_pixels)


def pairs_section(shown: Sequence[Shown], number: int, judged: bool) -> str:
    """The pairs as a section of the page.

    Args:
        shown: from choose_shown.
        number: the round they belong to; 0 if there is none yet.
        judged: adds what the oracle reads, for images of the built-in world.
    """
    if not number:
        return "<section><h2>Pairs</h2><p>No round has its pairs yet.</p></section>"
    if not shown:
        return f"<section><h2>Pairs</h2><p>Round {number} kept no pair.</p></section>"
    articles = "\n".join(_article(item, judged) for item in shown)
    return f"""<section><h2>Pairs of round {number}</h2>
<p class="note">The first of each category in turn, not chosen by their results. A number is an image's score,
the model's own unless curation.score names a function, or a caption's likeness to the true one; best first.</p>
{articles}</section>"""


def _article(item: Shown, judged: bool) -> str:
    pair = item.pair
    figures = "".join(_figure(row, _image_role(row, pair), judged) for row in item.images)
    images = f'<div class="images">{figures}</div>' if item.images else "<p>The candidates are not there any more.</p>"
    win = next((row for row in item.images if _image_role(row, pair) == "win"), None)
    questions = _questions(win, judged) if win and win["answers"] else ""
    if questions:
        questions = details("The questions, and what the model answers about the win", questions, opened=True)
    kept = {"both": "kept for both sides"}.get(pair["sides"], f"kept for {pair['sides']} only")
    return f"""<article class="record card"><header><h3>{escape(pair["caption"])}</h3>
<p class="over">{escape(pair["category"].replace("_", " "))}, {escape(kept)}, {escape(pair["record_id"])}</p></header>
<div class="split"><div><h4>Drawn for this prompt</h4>{images}{questions}</div>
<div><h4>Written about the real image</h4>
{picture(item.real_pixels, f"The real image: {pair['caption']}", "real")}
<ul class="captions">{_captions(item, judged)}</ul></div></div></article>"""


def _image_role(row: dict[str, Any], pair: dict[str, Any]) -> str:
    """ "win", "lose" or "": real images and those of the previous round are known by their codes, others by number."""
    for role in ("win", "lose"):
        index = pair[f"{role}_image_index"]
        same = row["token_ids"] == pair[f"{role}_codes"]
        if same and (row["kind"] != "image" if index < 0 else row["kind"] == "image" and row["index"] == index):
            return role
    return ""


def _figure(row: dict[str, Any], role: str, judged: bool) -> str:
    name = f"image {row['index'] + 1}" if row["kind"] == "image" else row["kind"].replace("_", " ")
    alt, lines = f"{name}, score {row['score']:.2f}", ""
    if judged and row["answers"]:  # a function's score has none
        right = sum(reply == answer["expected"] for reply, answer in zip(_read(row), row["answers"], strict=True))
        lines += f"<span>oracle {right}/{len(row['answers'])}</span>"
        alt += f", the oracle finds {right} of {len(row['answers'])} right"
    if row["kind"] != "image":
        lines += f"<span>{escape(name)}</span>"
    mark = f'<b class="mark">{role}</b> ' if role else ""
    image = picture(row["pixels"], f"{alt}, {role}" if role else alt)
    return f'<figure class="{role}">{image}<figcaption>{mark}{row["score"]:.2f}{lines}</figcaption></figure>'


def _questions(win: dict[str, Any], judged: bool) -> str:
    replies = _read(win) if judged else [None] * len(win["answers"])
    rows = []
    for item, reply in zip(win["answers"], replies, strict=True):
        wrong = item["answer"] != item["expected"]
        said = f"{escape(item['answer'])}<small>right: {100 * item['probability']:.0f}&nbsp;%</small>"
        cells = f"<td{' class=worse' if wrong else ''}>{said}</td>"
        if judged:
            differs = " class=worse" if reply != item["expected"] else ""
            cells += f"<td{differs}>{escape(reply or 'no single answer')}</td>"
        rows.append(f"<tr><td>{escape(item['question'])}</td><td>{escape(item['expected'])}</td>{cells}</tr>")
    last = "<th>oracle</th>" if judged else ""
    head = f"<thead><tr><th>question</th><th>right</th><th>model</th>{last}</tr></thead>"
    return scrolling(f"<table>{head}<tbody>{''.join(rows)}</tbody></table>", "questions")


def _read(row: dict[str, Any]) -> list[str | None]:
    """The oracle's answers to a candidate's questions."""
    [seen] = oracle.read(resize_images(row["pixels"][None], shapes.IMAGE_SIZE))
    return [oracle.answer(item["question"], seen) for item in row["answers"]]


def _captions(item: Shown, judged: bool) -> str:
    """Captions best first, equal ones once; those of the previous round that are in the pair, last. What is not true of
    the built-in world's picture says so."""
    times = Counter(row["text"] for row in item.captions)
    scores = {row["text"]: row["score"] for row in item.captions}
    pair, lines = item.pair, []
    for role in ("win", "lose"):
        if pair[f"{role}_caption"] is not None:
            scores.setdefault(pair[f"{role}_caption"], pair[f"{role}_caption_score"])
    for text, score in scores.items():
        role = "win" if text == pair["win_caption"] else "lose" if text == pair["lose_caption"] else ""
        untrue = judged and shapes.parse_caption(text) != shapes.parse_caption(pair["caption"])
        mark = f' <b class="mark">{role}{", but untrue" if untrue and role == "win" else ""}</b>' if role else ""
        mark += "<small>untrue or incomplete</small>" if untrue else ""
        said = (escape(text) or "<i>no words</i>") + mark
        if times[text] != 1:
            said += f"<small>{times[text]} times</small>" if times[text] else "<small>previous round</small>"
        shown_as = f"{role} untrue" if role and untrue else role
        lines.append(f'<li class="{shown_as}"><span class="score">{score:.2f}</span><span>{said}</span></li>')
    return "".join(lines)
