"""Where the joint vocabulary keeps text, special tokens, image codes and the mask, and how sequences are framed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

SPECIAL_TOKENS = ("soi", "eoi", "sov", "eov", "t2i", "mmu", "t2v", "v2v", "lvg")
"""The nine special tokens in Show-o's published order; they follow [PAD]."""
# Larger than any model's, and small enough that a damaged configuration asks for no endless work.
_LIMITS = {"text_vocab_size": 2**24, "codebook_size": 2**24, "num_image_tokens": 2**16}


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """Joint vocabulary of a unified model: [text | pad, nine specials | (unused) | image codes | mask].

    sot and eot are text tokens (Show-o uses the text tokenizer's bos and eos, which may be the same id). system_ids are
    the text ids that stand before an image's features in a model that understands images by features.
    """

    text_vocab_size: int
    codebook_size: int
    num_image_tokens: int
    sot: int
    eot: int
    system_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            if not 1 <= getattr(self, name) <= limit:
                raise ValueError(f"TokenLayout: {name} must lie in [1, {limit}], got {getattr(self, name)}")
        text_ids = [("sot", self.sot), ("eot", self.eot), *(("system_ids", token) for token in self.system_ids)]
        for name, token in text_ids:
            if not 0 <= token < self.text_vocab_size:
                raise ValueError(f"TokenLayout: {name} must be a text id in [0, {self.text_vocab_size}), got {token}")

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
        """Condition of an image: [t2i, sot, text, eot], a causal root span."""
        return [self.special("t2i"), self.sot, *text_ids, self.eot]

    def image(self, codes: Sequence[int]) -> list[int]:
        """An image that follows its prompt: [soi, codes, eoi], a full span."""
        return [self.soi, *(int(code) + self.code_offset for code in codes), self.eoi]

    def masked_image(self, known_codes: Sequence[int]) -> list[int]:
        """The same where generation starts: codes of -1 are masked."""
        return [self.soi, *(code + self.code_offset if code >= 0 else self.mask_id for code in known_codes), self.eoi]

    def image_prefix(self, codes: Sequence[int]) -> list[int]:
        """An image to be understood: [mmu, soi, codes, eoi], a full root span."""
        return [self.special("mmu"), *self.image(codes)]

    def question(self, text_ids: Sequence[int]) -> list[int]:
        """What is asked of an image: [sot, text], a causal span; its answer ends with eot."""
        return [self.sot, *text_ids]

    def feature_prefix(self, num_features: int) -> tuple[list[int], int]:
        """An image to be understood by its features: [mmu, system ids, soi, a pad for each feature], a root span.

        Returns: the ids, and how many precede the features: the span's mode, for the features alone are seen by all.
        Source: Show-o's variant with CLIP features, its attention mask for multimodal understanding.
        """
        before = [self.special("mmu"), *self.system_ids, self.soi]
        return [*before, *[self.pad] * num_features], len(before)

    def feature_question(self, text_ids: Sequence[int]) -> list[int]:
        """What is asked of an image given by features: [eoi, text], a causal span; its answer ends with eot."""
        return [self.eoi, *text_ids]

    def to_dict(self) -> dict[str, Any]:
        """The fields, for a configuration file."""
        return asdict(self)
