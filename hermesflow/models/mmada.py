"""MMaDA (Gen-Verse, arXiv 2505.15809): LLaDA-8B with image codes behind its vocabulary; bidirectional.

    Gen-Verse/MMaDA-8B-{Base,MixCoT}    config.json (mmada), weights, tokenizer.json

Images and text are filled from masks. Prompts: training/prompting_utils.py, generate.py and inference_mmu.py of MMaDA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hermesflow.engine.decoders.masked import ImageSamplingParams
from hermesflow.engine.decoders.masked_text import MaskedTextDecoder
from hermesflow.engine.image_tokenizers.magvit import VQTokenizer
from hermesflow.engine.transformer import Transformer
from hermesflow.models import llada, loading, magvit
from hermesflow.models.checkpoint import FETCHED, CheckpointModel, load_parts, on_meta
from hermesflow.models.model import PromptFormat
from hermesflow.models.text_tokenizers import FileTokenizer
from hermesflow.runtime.files import InputError, make_folder, shown

MODEL_TYPE = "mmada"
VQ_TOKENIZER, VQ_FOLDER = "showlab/magvitv2", "magvitv2"
PIXELS_PER_TOKEN = 16
PROMPTS = PromptFormat(
    caption_question="Please describe this image in detail.",
    question="\n{question}",
    answer="{answer}",
    max_prompt_tokens=510,
    max_caption_tokens=128,
    max_answer_tokens=128,
)
SAMPLING = ImageSamplingParams(num_steps=15, guidance_scale=3.5, mask_temperature=1.0, mask_decay="showo")
TOKENS = {
    "bos": "<|startoftext|>", "eot": "<|endoftext|>", "mask_id": "<|mdm_mask|>", "soi": "<|reserved_token_0|>",
    "eoi": "<|reserved_token_1|>", "t2i": "<|reserved_token_4|>", "mmu": "<|reserved_token_5|>",
    "pad": "<|reserved_token_9|>", "header": "<|start_header_id|>", "end_header": "<|end_header_id|>",
    "end_turn": "<|eot_id|>",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MMaDALayout(llada.LLaDALayout):
    """[text, specials and the mask among it | codes | rows that nothing uses].

    user_ids, assistant_ids: the names of the roles in a chat; line_ids: a line break. padded_to: tokens of a prompt
    with the pads before it, all of which are seen: the published weights were trained with 513. 0: none, as they draw.
    """

    vocab_size: int
    codebook_size: int
    num_image_tokens: int
    code_offset: int
    bos: int
    eot: int
    mask_id: int
    soi: int
    eoi: int
    t2i: int
    mmu: int
    pad: int
    header: int
    end_header: int
    end_turn: int
    user_ids: tuple[int, ...]
    assistant_ids: tuple[int, ...]
    line_ids: tuple[int, ...]
    padded_to: int = 0

    @property
    def image_grid(self) -> tuple[int, int]:
        """Square."""
        side = math.isqrt(self.num_image_tokens)
        return side, side

    @property
    def before_image(self) -> tuple[int, ...]:
        """soi."""
        return (self.soi,)

    @property
    def after_image(self) -> tuple[int, ...]:
        """eoi."""
        return (self.eoi,)

    @property
    def filler(self) -> int:
        """eos."""
        return self.eot

    def text_prompt(self, text_ids: Sequence[int]) -> list[int]:
        """Condition of an image: [pads, t2i, bos, text, eos]."""
        prompt = [self.t2i, self.bos, *text_ids, self.eot]
        return [self.pad] * (self.padded_to - len(prompt)) + prompt

    def image_prefix(self, codes: Sequence[int]) -> list[int]:
        """An image to be understood: [mmu, image]."""
        return [self.mmu, *self.image(codes)]

    def question(self, text_ids: Sequence[int]) -> list[int]:
        """A chat's first turn, and the beginning of the second; the text begins with a line break."""
        user = [self.bos, self.header, *self.user_ids, self.end_header, *text_ids, self.end_turn]
        return [*user, self.header, *self.assistant_ids, self.end_header, *self.line_ids]


class MMaDAModel(CheckpointModel):
    """A model of MMaDA's class."""

    text_decoder = MaskedTextDecoder

    def question_prompt(self, question: str) -> list[int]:
        """Text ids of a question, without blanks around it, as the chat template has it."""
        return super().question_prompt(question.strip())

    def write(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Writes the published layout, with the image tokenizer beside it."""
        super().write(folder, dtype)
        magvit.save_vq_tokenizer(self.vq_tokenizer, make_folder(folder / VQ_FOLDER))


class MMaDAFamily:
    """Opens checkpoints of MMaDA's class."""

    files = FETCHED

    def claims(self, config: Any) -> bool:
        """By its model_type."""
        return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE

    def load(
        self,
        folder: Path,
        config: Mapping[str, Any],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        vq_tokenizer: str | None = None,
    ) -> MMaDAModel:
        """Opens a checkpoint; see Family.load. vq_tokenizer is load_model's."""
        path, tokenizer = folder / "config.json", FileTokenizer(folder)
        with loading.errors_of(path):
            shape = llada.transformer_config(config, MODEL_TYPE, "MMaDA")
        layout = make_layout(config, tokenizer, shape.vocab_size, path)
        parts = on_meta(lambda: {"transformer": Transformer(shape)}, path)

        def open_tokenizer(device: torch.device) -> VQTokenizer:
            beside = folder / VQ_FOLDER
            return magvit.load_vq_tokenizer(vq_tokenizer or (str(beside) if beside.is_dir() else VQ_TOKENIZER), device)

        load_parts(parts, folder, llada.published_tensors, "", dtype, device)
        size = layout.image_grid[0] * PIXELS_PER_TOKEN
        return MMaDAModel(
            folder, parts, llada.published_tensors, tokenizer, layout, size, PROMPTS, SAMPLING, open_tokenizer
        )


FAMILY = MMaDAFamily()


def make_layout(config: Mapping[str, Any], tokenizer: FileTokenizer, vocab_size: int, path: Path) -> MMaDALayout:
    """The vocabulary: special tokens by name, codes from the tokenizer's size on.

    Raises: InputError if a token is missing or the sizes do not fit.
    """
    codes, tokens = config.get("codebook_size"), config.get("num_vq_tokens")
    is_number = [type(value) is int and 1 <= value <= 2**16 for value in (codes, tokens)]
    if not all(is_number) or math.isqrt(tokens) ** 2 != tokens:
        raise InputError(
            f"{path}: expected codebook_size from 1 to 65536 and num_vq_tokens as a square of such, got {shown(codes)} "
            f"and {shown(tokens)}; restore it from its source"
        )
    offset = max(tokenizer.vocabulary.values()) + 1
    if offset + codes > vocab_size:
        raise InputError(
            f"{path}: {offset} ids of the tokenizer and {codes} codes are more than the vocabulary of {vocab_size}; "
            "give the tokenizer that belongs to the checkpoint"
        )
    return MMaDALayout(
        vocab_size=vocab_size,
        codebook_size=codes,
        num_image_tokens=tokens,
        code_offset=offset,
        user_ids=tuple(tokenizer.encode("user")),
        assistant_ids=tuple(tokenizer.encode("assistant")),
        line_ids=tuple(tokenizer.encode("\n")),
        **{name: tokenizer.id(token) for name, token in TOKENS.items()},
    )
