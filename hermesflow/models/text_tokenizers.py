"""Text <-> ids of the text vocabulary: the built-in closed vocabulary, and published tokenizers of transformers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from hermesflow.runtime.files import InputError, check_unicode, read_bytes, read_json, reason_of, shown

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
        data = read_bytes(path)
        try:
            return cls(Tokenizer.from_buffer(data))
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(f"{path}: not a tokenizer ({reason_of(error)}); restore it from its source") from error

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens. Raises: InputError on a word that the vocabulary does not have."""
        encoding = self._tokenizer.encode(check_unicode(text, "text").lower(), add_special_tokens=False)
        unknown = self._tokenizer.token_to_id(UNKNOWN)
        if unknown in encoding.ids:
            start, end = encoding.offsets[encoding.ids.index(unknown)]
            words = sorted(word for word in self._tokenizer.get_vocab() if not word.startswith(("[", "<")))
            raise InputError(
                f"the model does not know the word {shown(text[start:end])} in {shown(text)}; it knows: "
                f"{', '.join(words)}"
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


class FileTokenizer:
    """A published tokenizer.json, whose special tokens lie inside its vocabulary and are found by name."""

    def __init__(self, folder: Path, roles: Sequence[str] = (), name: str = "tokenizer.json") -> None:
        """
        Args:
            folder: holds the file.
            roles: special tokens that the family's prompts spell out.
            name: of the file.
        Raises: InputError if the file is missing or damaged.
        """
        self.folder, path = folder, folder / name
        if not path.is_file():
            raise InputError(
                f"{folder}: holds no {name}; give the checkpoint as transformers publishes it (-hf), or put "
                "the file beside its weights"
            )
        data = read_bytes(path)
        try:
            self._tokenizer = Tokenizer.from_buffer(data)
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(f"{path}: not a tokenizer ({reason_of(error)}); restore it from its source") from error
        self.vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        special = {id: token.content for id, token in added.items() if token.special}
        self._refused = {id: name for id, name in special.items() if name not in roles}

    def id(self, name: str) -> int:
        """Of a token. Raises: InputError if the vocabulary has none of that name."""
        if name not in self.vocabulary:
            raise InputError(f"{self.folder}: the tokenizer has no {name}; give the one that belongs to the checkpoint")
        return self.vocabulary[name]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without a start and an end. Raises: InputError if it spells a special token."""
        ids = self._tokenizer.encode(check_unicode(text, "text"), add_special_tokens=False).ids
        special = next((self._refused[token] for token in ids if token in self._refused), None)
        if special is not None:
            raise InputError(f"{special} in {text!r} is a special token of the model; leave it out")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens and the blanks around it."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True).strip()


class SentencePieceTokenizer:
    """A published tokenizer.model with added_tokens.json, in the way of transformers 4.30 (its slow LlamaTokenizer).

    A text is cut at added tokens, pieces lose the white space beside them, and each is encoded by itself.
    """

    def __init__(self, folder: Path) -> None:
        """Raises: InputError if sentencepiece is not installed, or a file is missing or damaged."""
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise InputError(f"{folder}: sentencepiece is not installed; run: pip install sentencepiece") from error
        self.folder, path = folder, folder / "tokenizer.model"
        try:
            self._pieces = SentencePieceProcessor(model_proto=read_bytes(path))
            self._pieces.get_piece_size()
        except RuntimeError as error:
            raise InputError(f"{path}: not a tokenizer ({reason_of(error)}); restore it from its source") from error
        added = read_json(folder / "added_tokens.json")
        if not isinstance(added, dict) or not all(type(number) is int for number in added.values()):
            raise InputError(f"{folder / 'added_tokens.json'}: holds no ids by name; restore it from its source")
        self.added: dict[str, int] = added
        self._names = {number: name for name, number in added.items()}
        longest = sorted(added, key=len, reverse=True)
        self._cuts = re.compile(f"({'|'.join(map(re.escape, longest))})") if added else re.compile("(?!)")
        self.bos, self.eos = self._pieces.bos_id(), self._pieces.eos_id()

    @property
    def size(self) -> int:
        """Of the vocabulary: one more than its last id."""
        return max(self._pieces.get_piece_size() - 1, *self.added.values()) + 1

    def id(self, name: str) -> int:
        """Of an added token. Raises: InputError if there is none of that name."""
        if name not in self.added:
            raise InputError(f"{self.folder}: the tokenizer has no {name}; give the one that belongs to the checkpoint")
        return self.added[name]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without a start and an end. Raises: InputError if it spells an added token."""
        found = self._cuts.search(text)
        if found:
            raise InputError(f"{found[0]} in {text!r} is a special token of the model; leave it out")
        return self.encode_with_tokens(text)

    def encode_with_tokens(self, text: str) -> list[int]:
        """Likewise, added tokens by their names."""
        parts, ids = (
            self._cuts.split(check_unicode(text, "text")),
            [],
        )  # texts at even places, added tokens between them
        for number, part in enumerate(parts):
            if number % 2:
                ids.append(self.added[part])
                continue
            part = part.lstrip() if number else part
            part = part.rstrip() if number < len(parts) - 1 else part
            ids += self._pieces.encode(part) if part else []
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without start and end and the blanks around it; added tokens by their names, blanks between."""
        kept = (int(token) for token in ids if int(token) not in (self.bos, self.eos))
        known = itertools.groupby(kept, key=lambda token: self._names.get(token))
        parts = (" ".join([name] * len(list(run))) if name else self._pieces.decode(list(run)) for name, run in known)
        return " ".join(parts).strip()


class PretrainedTokenizer:
    """A published tokenizer of transformers, with a family's special tokens behind its vocabulary."""

    def __init__(self, folder: Path, special_tokens: Sequence[str]) -> None:
        """
        Args:
            folder: holds the tokenizer's files.
            special_tokens: [PAD] and the others, in order; they get the ids that follow the vocabulary.
        Raises: InputError if the folder holds no tokenizer, or one without a start and an end of text.
        """
        from transformers import AutoTokenizer

        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
            raise InputError(f"{folder}: holds no tokenizer; restore it from its source")  # transformers makes one up
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            tokenizer.add_special_tokens({"pad_token": special_tokens[0]})
            tokenizer.add_tokens(list(special_tokens[1:]))
            self._special_ids = tokenizer.convert_tokens_to_ids(list(special_tokens))
            tokenizer(special_tokens[0])  # a value of its configuration may be wrong that is not looked at before
        except Exception as error:  # transformers and tokenizers raise many kinds
            reason = reason_of(error)
            raise InputError(f"{folder}: holds no tokenizer ({reason}); restore it from its source") from error
        self._tokenizer, self._special_tokens, self.folder = tokenizer, special_tokens, folder
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if self.bos is None or self.eos is None:
            raise InputError(f"{folder}: the tokenizer has no start or no end of text; restore it from its source")
        self.size = len(tokenizer) - len(special_tokens)

    def check(self, text_vocab_size: int) -> None:
        """Raises InputError unless the special tokens follow a text vocabulary of that size."""
        expected = list(range(text_vocab_size, text_vocab_size + len(self._special_ids)))
        # An id too high, with another left out, would read as a special token or as a piece of an image.
        text_ids = [id for token, id in self._tokenizer.get_vocab().items() if token not in self._special_tokens]
        if self._special_ids != expected or max(text_ids) >= text_vocab_size:
            raise InputError(
                f"{self.folder}: the vocabulary does not add up: the tokenizer has {self.size} text ids up to "
                f"{max(text_ids)} and special tokens {self._special_ids[0]} to {self._special_ids[-1]}, config.json's "
                f"llm_vocab_size is {text_vocab_size}; give the tokenizer that belongs to the checkpoint"
            )

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Raises: InputError if it spells one of the special tokens."""
        ids = self._tokenizer(check_unicode(text, "text"))["input_ids"]
        special = next((token for token in ids if token in self._special_ids), None)
        if special is not None:
            name = self._tokenizer.convert_ids_to_tokens(special)
            raise InputError(f"{name} in {text!r} is a special token of the model; leave it out")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens and the blanks around it."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True).strip()
