"""Text models of transformers, loaded without running code of theirs, and embeddings of texts with a memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hermesflow.models.hub import find_folder
from hermesflow.runtime.files import InputError, reason_of

_BATCH = 64
_MAX_TOKENS = 512
_CACHED_TEXTS = 65536
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json")


def load_text_model(kind: str, name: str, instead: str) -> tuple[Any, Any]:
    """A tokenizer and a model, on the GPU if there is one; in fp32, but for a causal model on a GPU, which is in fp16.

    Args:
        kind: transformers' class that opens it: "AutoModel", "AutoModelForCausalLM" or "AutoModelForSeq2SeqLM".
        name: a model of the Hugging Face hub, or the folder of one.
        instead: what to do where it cannot be had, for the message.
    Returns: (tokenizer, model), the model ready for inference.
    Raises: InputError if it cannot be loaded, lacks weights, or its tokenizer has more tokens than it.
    """
    try:  # transformers itself would try an unreachable hub for a minute
        find_folder(name, ("config.json",), "text model", "google-bert/bert-large-uncased")
    except InputError as error:
        raise InputError(f"{error}, or {instead}") from error
    try:
        import transformers

        if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in _TOKENIZER_FILES):
            raise InputError("it holds no tokenizer")  # transformers makes one up
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        half = kind == "AutoModelForCausalLM" and torch.cuda.is_available()  # seven billion weights, as published
        model, loaded = getattr(transformers, kind).from_pretrained(
            name,
            trust_remote_code=False,
            weights_only=True,
            dtype=torch.float16 if half else torch.float32,
            output_loading_info=True,
        )
        # A pooler is for training and not used here; transformers draws other missing weights at random.
        missing = sorted(key for key in loaded["missing_keys"] if "pooler" not in key)
        if missing:
            raise InputError(f"it lacks {len(missing)} weights, such as {missing[0]}")
        num_embeddings = model.get_input_embeddings().num_embeddings
        if len(tokenizer) > num_embeddings:
            raise InputError(f"its tokenizer has {len(tokenizer)} tokens, the model {num_embeddings}")
    except Exception as error:  # transformers, huggingface_hub and safetensors raise many kinds
        raise InputError(
            f"{name}: this text model cannot be loaded ({reason_of(error)}); fetch it once with a network connection, "
            f"or {instead}"
        ) from error
    return tokenizer, model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


class TextEncoder:
    """Embeds texts of any number; what was embedded before is remembered."""

    def __init__(self, name: str, pooling: Literal["cls", "mean"], instead: str, *, cached_texts: int = _CACHED_TEXTS):
        """
        Args:
            name: see load_text_model.
            pooling: "cls" takes the last layer's state of the first token, "mean" the mean over the text's tokens.
            instead: see load_text_model.
            cached_texts: how many embeddings are remembered; the ones used longest ago go first.
        Raises: InputError if the model cannot be had.
        """
        self._name, self._pooling, self._cached_texts = name, pooling, cached_texts
        self._tokenizer, self._model = load_text_model("AutoModel", name, instead)
        room = getattr(self._model.config, "max_position_embeddings", _MAX_TOKENS)
        self._max_tokens = min(_MAX_TOKENS, self._tokenizer.model_max_length, room)
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of length 1, fp32 [len(texts), D] on the CPU; a text is cut at 512 tokens.

        Raises: InputError if the model gives no finite numbers.
        """
        known = {text: self._cache[text] for text in texts if text in self._cache}
        # Texts of like length go together, so that little is padded.
        missing = sorted(set(texts) - known.keys(), key=lambda text: (len(text), text))
        for start in range(0, len(missing), _BATCH):
            batch = missing[start : start + _BATCH]
            known.update(zip(batch, self._embed(batch), strict=True))
        for text in dict.fromkeys(texts):
            self._cache[text] = known[text]
            self._cache.move_to_end(text)
        while len(self._cache) > self._cached_texts:
            self._cache.popitem(last=False)
        if not texts:
            return torch.zeros(0, self._model.config.hidden_size)
        return torch.stack([known[text] for text in texts])

    @torch.inference_mode()
    def _embed(self, texts: list[str]) -> Tensor:
        inputs = self._tokenizer(
            texts, return_tensors="pt", padding=True, truncation=True, max_length=self._max_tokens
        ).to(self._model.device)
        states = self._model(**inputs).last_hidden_state
        if self._pooling == "cls":
            pooled = states[:, 0]
        else:
            mask = inputs["attention_mask"][:, :, None]
            pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        if not pooled.isfinite().all():
            raise InputError(f"{self._name}: this text model gives no finite numbers; its weights may be damaged")
        return F.normalize(pooled, dim=1).cpu()
