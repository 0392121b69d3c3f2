"""Text <-> ids of the text vocabulary: the built-in closed vocabulary, and published tokenizers of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from .files import InputError

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "[UNK]"


class WordTokenizer:
    """A closed vocabulary of lower-case words; id 0 begins and ends texts, as in GPT-2."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.bos = self.eos = tokenizer.token_to_id(END_OF_TEXT)
        self.size = max(tokenizer.get_vocab().values(), default=-1) + 1

    @classmethod
    def of_words(cls, words: Sequence[str]) -> WordTokenizer:
        """A tokenizer of these words."""
        vocabulary = {word: index for index, word in enumerate([END_OF_TEXT, UNKNOWN, *words])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return cls(tokenizer)

    @classmethod
    def from_file(cls, path: Path) -> WordTokenizer:
        """Reads what save wrote. Raises: InputError if the file is missing or damaged."""
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(f"{path}: not a tokenizer ({error}); restore it from its source") from error

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens. Raises: InputError on a word that the vocabulary does not have."""
        encoding = self._tokenizer.encode(text.lower(), add_special_tokens=False)
        unknown = self._tokenizer.token_to_id(UNKNOWN)
        if unknown in encoding.ids:
            start, end = encoding.offsets[encoding.ids.index(unknown)]
            words = sorted(word for word in self._tokenizer.get_vocab() if not word.startswith(("[", "<")))
            raise InputError(
                f"the model does not know the word {text[start:end]!r} in {text!r}; it knows: {', '.join(words)}"
            )
        return encoding.ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, side by side on all cores; unknown words become the unknown token."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens; ids outside the vocabulary are left out."""
        words = (self._tokenizer.id_to_token(int(token)) for token in ids)
        return " ".join(word for word in words if word and word != END_OF_TEXT)

    def save(self, folder: Path) -> None:
        """Writes folder/tokenizer.json."""
        self._tokenizer.save(str(folder / "tokenizer.json"))
