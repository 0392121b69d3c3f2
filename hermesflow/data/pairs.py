"""Homologous preference pairs: of each record's candidates a best and a worst image and a best and a worst caption.

Both sides of a pair come from one record. What is not kept is written down with its reason, so that every side of every
record is either in the pairs or among the rejected.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from hermesflow.config import CurationConfig
from hermesflow.data.records import Record, id_digest, png_bytes
from hermesflow.data.wording import token_f1
from hermesflow.runtime.files import ParquetRows, StrPath, damaged, read_parquet

SIDES = ("generation", "understanding")

_IDS = pa.list_(pa.int32())
PAIRS_SCHEMA = pa.schema(
    [
        ("record_id", pa.string()),
        ("category", pa.string()),
        ("caption", pa.string()),
        ("sides", pa.string()),
        ("record_codes", _IDS),
        ("win_codes", _IDS),
        ("lose_codes", _IDS),
        ("win_image_score", pa.float32()),
        ("lose_image_score", pa.float32()),
        ("win_image_index", pa.int32()),
        ("lose_image_index", pa.int32()),
        ("win_caption", pa.string()),
        ("lose_caption", pa.string()),
        ("win_caption_ids", _IDS),
        ("lose_caption_ids", _IDS),
        ("win_caption_score", pa.float32()),
        ("lose_caption_score", pa.float32()),
        ("questions", pa.list_(pa.string())),
        ("answers", pa.list_(pa.string())),
        ("choices", pa.list_(pa.list_(pa.string()))),
        ("record_image", pa.binary()),
    ]
)
"""sides is "both", "generation" or "understanding"; the columns of an absent side are null. An image index counts the
record's image candidates; PREVIOUS stands for an image of the previous round, REAL for the record's own. Caption ids
lack the end of text. questions are those about the record's own image, balanced where it has such, with their right
answers and their choices; null where they are not known, and files of before have no choices. record_image is the file
of the record's own image, for models that do not see codes; null for others."""
_OPTIONAL = ("choices", "record_image")
REJECTED_SCHEMA = pa.schema([("record_id", pa.string()), ("side", pa.string()), ("reason", pa.string())])

PREVIOUS = -1
REAL = -2
CAPTION_MARGIN = 0.01
"""The win's caption scores above the lose's by at least this much: a difference in wording, not in rounding. The paper
asks for none; token-f1 moves by more than this with any word."""
_DIGITS = 6  # scores are float32; without rounding 1 - 0.8 is less than 0.2 and a float32 0.6 more than 0.6


class Candidate(NamedTuple):
    """An image or a caption with its score."""

    score: float
    index: int
    token_ids: list[int]
    text: str | None


class Preference(NamedTuple):
    """One side of a pair."""

    win: Candidate
    lose: Candidate


def make_pairs(
    records: Sequence[Record], candidates: pa.Table, config: CurationConfig, previous: pa.Table | None = None
) -> tuple[pa.Table, pa.Table]:
    """Chooses each record's win and lose, and says why where there is none.

    Without a previous pair the win is the best and the lose the worst candidate, or what config.win_image and
    config.lose_caption say. With one, the win is the new best, and
    its lose is the previous win if the new best beats it by the margin, else the previous lose. In either case the win
    must beat its lose by the margin, and the best image must score above the threshold.

    Args:
        records: the records with codes.
        candidates: those of the records, from curate; made with the same `previous`.
        config: threshold, margin, keep, win_image and lose_caption are used; margin is that of images, captions have
            CAPTION_MARGIN.
        previous: the pairs of the previous round, if only of these records.
    Returns: (pairs with PAIRS_SCHEMA, rejected with REJECTED_SCHEMA), both in the records' order.
    Raises: ValueError on a record without codes, or a previous pair whose images were not scored again.
    Source: HermesFlow (arXiv 2502.12148), section 4; its published script lets a lose stand above its win.
    """
    found = _group(candidates)
    before = {row["record_id"]: row for row in previous.to_pylist()} if previous is not None else {}
    pairs, rejected = [], []
    for record in records:
        chosen = {
            "generation": _choose_images(record.id, found[record.id], before.get(record.id), config),
            "understanding": _choose_captions(found[record.id], before.get(record.id), config),
        }
        kept = {side: outcome for side, outcome in chosen.items() if isinstance(outcome, Preference)}
        if config.keep == "both" and len(kept) < len(SIDES):
            dropped = "other side rejected: curation.keep is both"
            chosen, kept = chosen | dict.fromkeys(kept, dropped), {}
        rejected += [
            {"record_id": record.id, "side": side, "reason": outcome}
            for side, outcome in chosen.items()
            if isinstance(outcome, str)
        ]
        if kept:
            pairs.append(_pair_row(record, kept.get("generation"), kept.get("understanding")))
    return pa.Table.from_pylist(pairs, PAIRS_SCHEMA), pa.Table.from_pylist(rejected, REJECTED_SCHEMA)


def records_table(records: Iterable[Record]) -> pa.Table:
    """Records without a side to learn from, with PAIRS_SCHEMA: what is asked about their own images can be replayed.

    Raises: ValueError on a record without codes.
    """
    return pa.Table.from_pylist([_pair_row(record, None, None) for record in records], PAIRS_SCHEMA)


def pair_statistics(pairs: pa.Table, rejected: pa.Table) -> dict:
    """Counts for a run's summary.

    Args:
        pairs: from make_pairs.
        rejected: from make_pairs.
    Returns: {"records", "kept", "both", "generation", "understanding", "rejected"}: records seen, records kept, those
        kept for both sides and for one only, and {"side: reason": count} of rejected sides, most frequent first.
    """
    sides = Counter(pairs["sides"].to_pylist())
    reasons = Counter(f"{row['side']}: {row['reason'].partition(':')[0]}" for row in rejected.to_pylist())
    ids = {*pairs["record_id"].to_pylist(), *rejected["record_id"].to_pylist()}
    counts = {side: sides[side] for side in ("both", *SIDES)}
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return {"records": len(ids), "kept": len(pairs), **counts, "rejected": dict(ordered)}


class PairFile:
    """The pairs of a file, found by their record and read where they are used; each takes 16 bytes of memory."""

    def __init__(self, path: StrPath) -> None:
        """Raises: InputError if the file is missing, damaged or holds no pairs, here or where it is read."""
        self._rows = ParquetRows(path, _names(ParquetRows(path).schema.names))
        digests = array("Q")
        for table in ParquetRows(path, ["record_id"]).each():
            digests.extend(map(id_digest, table["record_id"].to_pylist()))
        found = np.array(digests, dtype=np.uint64)
        self._order = np.argsort(found, kind="stable")
        self._digests = found[self._order]

    def of(self, records: Iterable[Record]) -> pa.Table:
        """The pairs with PAIRS_SCHEMA of those records that have one."""
        found = (self._pair(record.id) for record in records)
        table = pa.concat_tables([self._rows.read(0, 0), *(pair for pair in found if pair is not None)])
        return _cast(self._rows.path, table)

    def _pair(self, id: str) -> pa.Table | None:
        digest = np.uint64(id_digest(id))
        start, stop = (int(np.searchsorted(self._digests, digest, side)) for side in ("left", "right"))
        rows = (self._rows.read(row, row + 1) for row in self._order[start:stop].tolist())
        return next((row for row in rows if row["record_id"][0].as_py() == id), None)


def read_pairs(path: StrPath) -> pa.Table:
    """Reads a file of pairs that files.write_parquet wrote.

    Args:
        path: the file.
    Returns: the pairs with PAIRS_SCHEMA.
    Raises: InputError if the file is missing, damaged or holds no pairs.
    """
    return _cast(path, read_parquet(path, _names(ParquetRows(path).schema.names)))


def each_row(pairs: pa.Table) -> Iterator[dict]:
    """The rows one by one; as Python objects all at once, those of a large table would not fit into memory."""
    for batch in pairs.to_batches(256):
        yield from batch.to_pylist()


def _names(columns: Sequence[str]) -> list[str]:
    """The columns to read from a file that has these."""
    return [name for name in PAIRS_SCHEMA.names if name not in _OPTIONAL or name in columns]


def _cast(path: StrPath, table: pa.Table) -> pa.Table:
    for name in set(_OPTIONAL) - set(table.column_names):
        table = table.append_column(name, pa.nulls(len(table), PAIRS_SCHEMA.field(name).type))
    try:
        return table.select(PAIRS_SCHEMA.names).cast(PAIRS_SCHEMA)
    except (pa.ArrowException, ValueError) as error:
        raise damaged(path, "pairs", error) from error


def _group(candidates: pa.Table) -> dict[str, dict[str, list[Candidate]]]:
    """Candidates by record and kind, in the order of their index."""
    found: dict[str, dict[str, list[Candidate]]] = defaultdict(lambda: defaultdict(list))
    columns = ("record_id", "kind", "score", "index", "token_ids", "text")
    for record_id, kind, score, *rest in zip(*(candidates[name].to_pylist() for name in columns), strict=True):
        found[record_id][kind].append(Candidate(round(score, _DIGITS), *rest))
    for kinds in found.values():
        for items in kinds.values():
            items.sort(key=lambda item: item.index)
    return found


def _choose_images(
    record_id: str, found: dict[str, list[Candidate]], before: dict | None, config: CurationConfig
) -> Preference | str:
    """The win and the lose image, or why there are none."""
    if not found["image"]:
        return "no images: there are no candidates"
    win, lose = _extremes(found["image"])
    if config.win_image == "real":
        if not found["real"]:
            raise ValueError(
                f"make_pairs: expected a candidate 'real' of record {record_id!r}, got none; give curate these settings"
            )
        win = found["real"][0]._replace(index=REAL)
    if win.score <= config.threshold:
        return f"best image not above threshold: it scores {win.score:.3f}, needed is more than {config.threshold:g}"
    if before is not None and before["win_codes"] is not None:
        for kind in ("previous_win", "previous_lose"):
            if not found[kind]:
                raise ValueError(
                    f"make_pairs: expected a candidate {kind!r} of record {record_id!r}, got none; give curate the "
                    "same previous pairs"
                )
        old_win, old_lose = (found[kind][0]._replace(index=PREVIOUS) for kind in ("previous_win", "previous_lose"))
        lose = old_win if _beats(win, old_win, config.margin) else old_lose
    return _checked(Preference(win, lose), config.margin, "images")


def _choose_captions(
    found: dict[str, list[Candidate]], before: dict | None, config: CurationConfig
) -> Preference | str:
    """The win and the lose caption, or why there are none."""
    captions = found["caption"]
    if not captions:
        return "no captions: there are no candidates"
    win, lose = _extremes(captions)
    if before is not None and before["win_caption_ids"] is not None:
        old_win, old_lose = (_previous_caption(before, role) for role in Preference._fields)
        lose = old_win if _beats(win, old_win, CAPTION_MARGIN) else old_lose
    elif len({item.text for item in captions}) == 1:
        return f"all captions alike: all {len(captions)} say {win.text!r}"
    elif config.lose_caption == "alike":
        lose = _likest(win, captions) or lose
    return _checked(Preference(win, lose), CAPTION_MARGIN, "captions")


def _previous_caption(before: dict, role: str) -> Candidate:
    """Its score needs no new judge: it compares two texts that have not changed."""
    score, ids, text = (before[f"{role}_caption{suffix}"] for suffix in ("_score", "_ids", ""))
    return Candidate(round(score, _DIGITS), PREVIOUS, ids, text)


def _extremes(items: list[Candidate]) -> Preference:
    """The best and the worst, of equals the one with the lower index."""
    return Preference(max(items, key=lambda item: item.score), min(items, key=lambda item: item.score))


def _likest(win: Candidate, captions: list[Candidate]) -> Candidate | None:
    """Of the captions that the win beats the one whose words are most like its own, of equals the worst."""
    beaten = [item for item in captions if _beats(win, item, CAPTION_MARGIN) and item.text != win.text]
    return max(beaten, key=lambda item: (token_f1(item.text, win.text), -item.score), default=None)


def _beats(win: Candidate, lose: Candidate, margin: float) -> bool:
    gain = round(win.score - lose.score, _DIGITS)
    return gain > 0 and gain >= margin


def _checked(pair: Preference, margin: float, what: str) -> Preference | str:
    win, lose = pair
    if win.token_ids == lose.token_ids or (win.text is not None and win.text == lose.text):
        return f"win and lose {what} alike: {_name(win)} and {_name(lose)}"
    if not _beats(win, lose, margin):
        scores = f"{_name(win)} scores {win.score:.3f}, {_name(lose)} {lose.score:.3f}"
        return f"margin of {what} too small: {scores}, needed is {margin:g} more"
    return pair


def _name(item: Candidate) -> str:
    return {PREVIOUS: "the previous", REAL: "the real one"}.get(item.index, f"number {item.index}")


def _pair_row(record: Record, images: Preference | None, captions: Preference | None) -> dict:
    if record.codes is None:
        raise ValueError(f"make_pairs: expected codes in record {record.id!r}, got none; encode its image first")
    row = dict.fromkeys(PAIRS_SCHEMA.names)
    row |= {
        "record_id": record.id,
        "category": record.category,
        "caption": record.caption,
        "sides": "both" if images and captions else "generation" if images else "understanding",
        "record_codes": record.codes.tolist(),
        "questions": [question.question for question in record.image_questions],
        "answers": [question.answer for question in record.image_questions],
        "choices": [list(question.choices) for question in record.image_questions],
        "record_image": png_bytes(record.image),
    }
    for role in Preference._fields:
        if images:
            image = getattr(images, role)
            row |= {f"{role}_codes": image.token_ids, f"{role}_image_score": image.score}
            row[f"{role}_image_index"] = image.index
        if captions:
            caption = getattr(captions, role)
            row |= {f"{role}_caption": caption.text, f"{role}_caption_ids": caption.token_ids}
            row[f"{role}_caption_score"] = caption.score
    return row
