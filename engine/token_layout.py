"""Where a joint vocabulary keeps text, image codes and special tokens, and how sequences are framed.

Layout is what the engine asks for; a family describes its own in a subclass. TokenLayout is Show-o's order, which the
built-in model shares.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hermesflow.kernels.span_tree import Place

SPECIAL_TOKENS = ("soi", "eoi", "sov", "eov", "t2i", "mmu", "t2v", "v2v", "lvg")
"""The nine special tokens in Show-o's published order; they follow [PAD]."""
# Larger than any model's, and small enough that a damaged configuration asks for no endless work.
_LIMITS = {"text_vocab_size": 2**24, "codebook_size": 2**24, "num_image_tokens": 2**16}


def check_grid(owner: str, grid: Any) -> None:
    """Raises ValueError, which begins with owner, unless grid is a tuple of rows and columns of at most 2^16 codes."""
    most = _LIMITS["num_image_tokens"]
    fits = isinstance(grid, tuple) and len(grid) == 2 and all(type(side) is int and side >= 1 for side in grid)
    if not fits or grid[0] * grid[1] > most:
        raise ValueError(f"{owner}: expected grid as (rows, columns) from 1, of at most {most} codes, got {grid!r:.80}")


class Ids:
    """Some ids of the joint vocabulary, in an order that numbers them from 0."""

    def __init__(self, ids: range | Sequence[int]) -> None:
        """
        Args:
            ids: distinct; a range of step 1 costs neither copies nor lookups.
        """
        is_range = isinstance(ids, range) and ids.step == 1
        self.range = ids if is_range else None
        self._ids = None if is_range else np.array(ids, dtype=np.int64)
        self._number = None if is_range else {int(id): number for number, id in enumerate(ids)}
        if not len(self) or len(self) < len(ids):
            raise ValueError(f"Ids: expected at least one id, none of them twice, got {list(ids)[:8]}")
        self._tables: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return len(self._number if self.range is None else self.range)

    def __contains__(self, id: int) -> bool:
        return id in (self._number if self.range is None else self.range)

    def __iter__(self) -> Iterator[int]:
        return iter(self._number if self.range is None else self.range)

    def __getitem__(self, number: int) -> int:
        return int(self._ids[number]) if self.range is None else self.range[number]

    def __str__(self) -> str:
        return f"{len(self)} ids" if self.range is None else f"[{self.range.start}, {self.range.stop})"

    def of(self, numbers: Tensor) -> Tensor:
        """The ids of numbers int64 of any shape."""
        if self.range is None:
            return self._table(numbers.device)[numbers]
        return numbers + self.range.start if self.range.start else numbers

    def numbers(self, ids: Tensor) -> Tensor:
        """The numbers of ids int64 of any shape, all of them among these."""
        if self.range is None:
            table = self._table(ids.device)
            order = table.argsort()
            return order[torch.searchsorted(table[order], ids)]
        return ids - self.range.start if self.range.start else ids

    def rows(self, head: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Weight [n, D] and bias [n] of a head's rows for these ids; views of a range, else copies."""
        rows = slice(self.range.start, self.range.stop) if self.range is not None else self._table(head.weight.device)
        return head.weight[rows], None if head.bias is None else head.bias[rows]

    def _table(self, device: torch.device) -> Tensor:
        """Kept by device, since a captured graph may not copy from the host."""
        if device not in self._tables:
            with torch.inference_mode(False):  # drawing makes it, and training uses it too
                self._tables[device] = torch.from_numpy(self._ids).to(device)
        return self._tables[device]


class FeatureSpan(NamedTuple):
    """A span in which features stand.

    ids: its tokens.
    rows: which of them features stand in, ascending.
    mode, place: its own.
    before: ids of a causal root that all images follow; none: each image is a root.
    shared: the first features, the same of every image, that stand at the end of that root instead.
    """

    ids: list[int]
    rows: Sequence[int]
    mode: str | int
    place: Place
    before: tuple[int, ...] = ()
    shared: int = 0


class Layout(ABC):
    """What the engine asks of a model's vocabulary and sequences.

    Text ids are ids of the joint vocabulary, wherever they lie there; image codes are counted from 0. Unless the
    layout is bidirectional, an image that is drawn is a child of its condition, a causal root. An image that is
    understood is a root, its question a causal child, and the answer a causal child of that, which ends with eot.
    """

    vocab_size: int
    eot: int
    """Ends an answer; one of text_ids."""
    text_ids: Ids
    """What text may hold."""
    code_ids: Ids | None
    """Of the image codes, in the code book's order; None in a family that draws latents."""
    mask_id: int | None = None
    """Stands for a code that is not drawn yet; None in a family that draws code by code."""
    codebook_size: int
    """How many image codes there are; 0 in a family that draws latents."""
    num_image_tokens: int
    """Codes, or latents, of an image."""
    image_grid: tuple[int, int]
    """Rows and columns of an image's codes, or latents."""
    image_place: Place = Place()
    """Of an image of latents: its positions, and the tokens around them that the first expert computes."""
    image_mode: str = "full"
    """Of an image that is drawn: "full", or "causal" where it is drawn code by code."""
    prefix_mode: str = "full"
    """Of an image that is understood, likewise."""
    codes_apart: bool = False
    """Whether a code's probability is one among the codes, not in the joint vocabulary."""
    is_bidirectional: bool = False
    """Whether attention is bidirectional throughout: a prompt and its image are one full span, and so are an image, a
    question and the masked region of its answer."""
    after_answer: tuple[int, ...] = ()
    """Ids behind the region of an answer that is drawn, in a bidirectional layout."""
    filler: int
    """What fills the region behind an answer and its eot, in training; in a bidirectional layout."""
    before_image: tuple[int, ...]
    row_end: tuple[int, ...] = ()
    after_image: tuple[int, ...]
    """Ids around an image's codes, and those that follow each row of them."""

    @abstractmethod
    def text_prompt(self, text_ids: Sequence[int]) -> list[int]:
        """Condition of an image; without text the unconditional one."""

    def unguided_prompt(self, text_ids: Sequence[int]) -> list[int]:
        """What stands in place of text_prompt in the unconditional half of guidance."""
        return self.text_prompt(())

    @abstractmethod
    def image_prefix(self, codes: Sequence[int]) -> list[int]:
        """An image to be understood."""

    @abstractmethod
    def question(self, text_ids: Sequence[int]) -> list[int]:
        """What is asked of an image."""

    def asked(self, codes: Sequence[int], text_ids: Sequence[int]) -> list[int]:
        """An image together with what is asked of it: all that precedes the answer."""
        return [*self.image_prefix(codes), *self.question(text_ids)]

    def of_grid(self, grid: tuple[int, int]) -> Layout:
        """The same for images of so many rows and columns. Raises: ValueError in a family that draws one grid alone."""
        if tuple(grid) != self.image_grid:
            rows, columns = self.image_grid
            raise ValueError(
                f"{type(self).__name__}: the model draws images of {rows} x {columns} codes alone, got a grid of "
                f"{grid[0]} x {grid[1]}; leave it out"
            )
        return self

    def of_sampling(self, params: Any) -> Layout:
        """The same for the grid of sampling parameters, where they have one. Raises: as of_grid."""
        grid = getattr(params, "grid", None)
        return self.of_grid(grid) if grid else self

    def feature_prefix(self, num_features: int) -> tuple[list[int], int]:
        """An image to be understood by its features, a place for each, a root span.

        Returns: the ids, and how many precede the features: the span's mode, for the features alone are seen by all.
        Raises: ValueError in a family that sees codes alone.
        """
        raise ValueError(f"{type(self).__name__}: the model understands images by their codes, got features")

    def feature_span(self, num_features: int) -> FeatureSpan:
        """The span of an image by its features. Raises: as feature_prefix."""
        ids, first = self.feature_prefix(num_features)
        rows = range(first, first + num_features)
        return FeatureSpan(ids, rows, first if self.prefix_mode == "full" else "causal", Place())

    def feature_question(self, text_ids: Sequence[int]) -> list[int]:
        """What is asked of an image given by features."""
        return self.question(text_ids)

    def image(self, codes: Sequence[int]) -> list[int]:
        """An image that follows its prompt: its codes, of which -1 is masked, and the ids around them."""
        columns, ids = self.image_grid[1], list(self.before_image)
        for start in range(0, len(codes), columns):
            row = codes[start : start + columns]
            ids += [self.code_ids[code] if code >= 0 else self.mask_id for code in row]
            ids += self.row_end
        return ids + list(self.after_image)

    latent_size: int = 0
    """Numbers of a latent, in a family that draws latents."""

    @property
    def code_length(self) -> int:
        """Whole numbers by which an image is kept: its codes, or its latents, two numbers of 16 bits in each."""
        return self.num_image_tokens * self.latent_size // 2 if self.latent_size else self.num_image_tokens

    def check_codes(self, codes: np.ndarray) -> None:
        """Raises ValueError, which says what is wrong, unless codes int [M] are an image's."""
        known = range(-(2**31), 2**31) if self.latent_size else range(self.codebook_size)
        least, most = (codes.min(), codes.max()) if len(codes) == self.code_length else (0, known.stop)
        if not known.start <= least <= most < known.stop:
            found = f" from {least} to {most}" if len(codes) == self.code_length else ""
            raise ValueError(
                f"expected {self.code_length} image codes in [{known.start}, {known.stop}), got {len(codes)}{found}"
            )
        if self.latent_size and not np.isfinite(codes.astype(np.int32).view(np.float16)).all():
            raise ValueError("expected finite latents of 16 bits, got codes that are none")

    @cached_property
    def image_length(self) -> int:
        """Tokens of an image that follows its prompt."""
        rows, columns = self.image_grid
        return len(self.before_image) + rows * (columns + len(self.row_end)) + len(self.after_image)

    @cached_property
    def code_positions(self) -> np.ndarray:
        """Where in that span its codes stand, int64 [num_image_tokens]."""
        rows, columns = self.image_grid
        first = len(self.before_image) + np.arange(rows) * (columns + len(self.row_end))
        return (first[:, None] + np.arange(columns)).ravel()


@dataclass(frozen=True, kw_only=True)
class TokenLayout(Layout):
    """Show-o's vocabulary, and the built-in model's: [text | pad, nine specials | image codes | mask].

    sot and eot are text tokens (Show-o uses the text tokenizer's bos and eos, which may be the same id). system_ids are
    the text ids that stand before an image's features in a model that understands images by features. image_rows 0: an
    image has as many rows as columns. image_mode is "full", or "causal" in a model that draws code by code; it then
    sees images causally too.
    """

    text_vocab_size: int
    codebook_size: int
    num_image_tokens: int
    sot: int
    eot: int
    system_ids: tuple[int, ...] = ()
    image_rows: int = 0
    image_mode: str = "full"

    def __post_init__(self) -> None:
        if self.image_mode not in ("full", "causal"):
            raise ValueError(f"TokenLayout: image_mode must be 'full' or 'causal', got {self.image_mode!r:.80}")
        for name, limit in _LIMITS.items():
            if not 1 <= getattr(self, name) <= limit:
                raise ValueError(f"TokenLayout: {name} must lie in [1, {limit}], got {getattr(self, name)}")
        text_ids = [("sot", self.sot), ("eot", self.eot), *(("system_ids", token) for token in self.system_ids)]
        for name, token in text_ids:
            if not 0 <= token < self.text_vocab_size:
                raise ValueError(f"TokenLayout: {name} must be a text id in [0, {self.text_vocab_size}), got {token}")
        if self.image_rows and self.num_image_tokens % self.image_rows:
            raise ValueError(
                f"TokenLayout: image_rows must divide num_image_tokens {self.num_image_tokens}, got {self.image_rows}"
            )

    @cached_property
    def image_grid(self) -> tuple[int, int]:
        """Rows and columns of an image's codes; a single row where they are no square and image_rows does not say."""
        side = math.isqrt(self.num_image_tokens)
        rows = self.image_rows or (side if side**2 == self.num_image_tokens else 1)
        return rows, self.num_image_tokens // rows

    @cached_property
    def text_ids(self) -> Ids:
        """The first of the vocabulary."""
        return Ids(range(self.text_vocab_size))

    @cached_property
    def code_ids(self) -> Ids:
        """Of the image codes."""
        return Ids(range(self.code_offset, self.code_offset + self.codebook_size))

    @property
    def prefix_mode(self) -> str:
        """Of an image that is understood, that of one that is drawn."""
        return self.image_mode

    @property
    def pad(self) -> int:
        """Id of [PAD]; in a sequence it only holds the place of an image's features."""
        return self.text_vocab_size

    def special(self, name: str) -> int:
        """Id of one of SPECIAL_TOKENS."""
        return self.text_vocab_size + 1 + SPECIAL_TOKENS.index(name)

    @property
    def soi(self) -> int:
        """Start of image."""
        return self.special("soi")

    @property
    def eoi(self) -> int:
        """End of image."""
        return self.special("eoi")

    @property
    def before_image(self) -> tuple[int, ...]:
        """soi."""
        return (self.soi,)

    @property
    def after_image(self) -> tuple[int, ...]:
        """eoi."""
        return (self.eoi,)

    @property
    def code_offset(self) -> int:
        """Id of image code 0."""
        return self.text_vocab_size + 1 + len(SPECIAL_TOKENS)

    @property
    def mask_id(self) -> int:
        """Id of the mask token, the last of the vocabulary."""
        return self.code_offset + self.codebook_size

    @property
    def vocab_size(self) -> int:
        """Size of the joint vocabulary."""
        return self.mask_id + 1

    def text_prompt(self, text_ids: Sequence[int]) -> list[int]:
        """Condition of an image: [t2i, sot, text, eot]."""
        return [self.special("t2i"), self.sot, *text_ids, self.eot]

    def image_prefix(self, codes: Sequence[int]) -> list[int]:
        """An image to be understood: [mmu, soi, codes, eoi]."""
        return [self.special("mmu"), *self.image(codes)]

    def question(self, text_ids: Sequence[int]) -> list[int]:
        """What is asked of an image: [sot, text]."""
        return [self.sot, *text_ids]

    def of_sampling(self, params: Any) -> Layout:
        """The same for the grid of sampling parameters, where they have one. Raises: as of_grid."""
        grid = getattr(params, "grid", None)
        return self.of_grid(grid) if grid else self

    def feature_prefix(self, num_features: int) -> tuple[list[int], int]:
        """An image to be understood by its features: [mmu, system ids, soi, a pad for each feature].

        Source: Show-o's variant with CLIP features, its attention mask for multimodal understanding.
        """
        before = [self.special("mmu"), *self.system_ids, self.soi]
        return [*before, *[self.pad] * num_features], len(before)

    def feature_question(self, text_ids: Sequence[int]) -> list[int]:
        """What is asked of an image given by features: [eoi, text]."""
        return [self.eoi, *text_ids]

    def to_dict(self) -> dict[str, Any]:
        """The fields, for a configuration file."""
        return asdict(self)
