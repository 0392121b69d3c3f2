"""Lumina-DiMOO (Alpha-VLLM, arXiv 2510.06308): LLaDA-8B with image codes behind its vocabulary; bidirectional.

    Alpha-VLLM/Lumina-DiMOO    config.json (llada), weights, tokenizer.json, vqvae/ of diffusers

Images of any grid and text are filled from masks. Prompts: generators/ and inference/ of Lumina-DiMOO.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hermesflow.engine.decoders.masked import ImageSamplingParams
from hermesflow.engine.decoders.masked_text import MaskedTextDecoder
from hermesflow.engine.image_tokenizers.vqgan import VQGAN
from hermesflow.engine.token_layout import check_grid
from hermesflow.engine.transformer import Transformer
from hermesflow.engine.weights import save_tensors
from hermesflow.models import llada, loading, vqgan
from hermesflow.models.checkpoint import FETCHED, FILES, CheckpointModel, load_parts, on_meta
from hermesflow.models.hub import find_folder
from hermesflow.models.model import PromptFormat
from hermesflow.models.text_tokenizers import FileTokenizer
from hermesflow.runtime.files import InputError, make_folder, read_json

MODEL_TYPE, CLASS_NAME = "llada", "LLaDAForMultiModalGeneration"
VQ_FOLDER, VQ_TOKENIZER = "vqvae", "Alpha-VLLM/Lumina-DiMOO"
GRID, PIXELS_PER_TOKEN = 64, 16
"""Rows and columns of an image of 1024 x 1024 pixels."""
DRAWING_SYSTEM = "Generate an image according to the text prompt."
SEEING_SYSTEM = (
    "You are a multimodal model that can process both text and images. Answer the following question based on the "
    "provided images. Analyze each image and combine relevant details to answer."
)
PROMPTS = PromptFormat(
    caption_question="Please describe this image.",
    question="{question}",
    answer="{answer}",
    max_caption_tokens=128,
    max_answer_tokens=128,
)
SAMPLING = ImageSamplingParams(
    num_steps=64, guidance_scale=4.0, mask_temperature=1.0, mask_decay="none", schedule_unknown=True
)
TOKENS = {
    "mask_id": "<|mdm_mask|>", "newline": "<|reserved_token_0|>", "filler": "<|reserved_token_254|>",
    "system": "<system>", "end_system": "</system>", "user": "<user>", "end_user": "</user>", "boi": "<IMAGE>",
    "eoi": "</IMAGE>", "uncondition": "<uncondition>", "boa": "<answer>", "eot": "</answer>",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DiMOOLayout(llada.LLaDALayout):
    """[text, specials and the mask among it | codes]; </answer> ends an answer, and the sequence of an image too.

    drawing_ids, seeing_ids: the system prompts.
    """

    vocab_size: int
    code_offset: int
    image_grid: tuple[int, int]
    mask_id: int
    newline: int
    filler: int
    system: int
    end_system: int
    user: int
    end_user: int
    boi: int
    eoi: int
    uncondition: int
    boa: int
    eot: int
    drawing_ids: tuple[int, ...]
    seeing_ids: tuple[int, ...]

    def of_grid(self, grid: tuple[int, int]) -> DiMOOLayout:
        """The same for images of so many rows and columns."""
        check_grid("Lumina-DiMOO", grid)
        return replace(self, image_grid=grid)

    @property
    def num_image_tokens(self) -> int:
        """Of the grid."""
        return self.image_grid[0] * self.image_grid[1]

    @property
    def codebook_size(self) -> int:
        """As many as there are rows behind the tokenizer's vocabulary."""
        return self.vocab_size - self.code_offset

    @property
    def before_image(self) -> tuple[int, ...]:
        """Beginning of the answer and of the image."""
        return self.boa, self.boi

    @property
    def row_end(self) -> tuple[int, ...]:
        """The line break."""
        return (self.newline,)

    @property
    def after_image(self) -> tuple[int, ...]:
        """End of the image and of the answer."""
        return self.eoi, self.eot

    @property
    def after_answer(self) -> tuple[int, ...]:
        """The end of the answer, which is there from the start."""
        return (self.eot,)

    def text_prompt(self, text_ids: Sequence[int]) -> list[int]:
        """Condition of an image; without text <uncondition> stands in its place."""
        system = [self.system, *self.drawing_ids, self.end_system]
        return [*system, self.user, *(text_ids or (self.uncondition,)), self.end_user]

    def image_prefix(self, codes: Sequence[int]) -> list[int]:
        """An image to be understood, as it stands among the user's words."""
        return self.image(codes)[1:-1]

    def question(self, text_ids: Sequence[int]) -> list[int]:
        """What stands around an image that is asked about, the question before it."""
        system = [self.system, *self.seeing_ids, self.end_system]
        return [*system, self.user, *text_ids, self.end_user, self.boa]

    def asked(self, codes: Sequence[int], text_ids: Sequence[int]) -> list[int]:
        """The question, then the image, both the user's."""
        around = self.question(text_ids)
        return [*around[:-2], *self.image_prefix(codes), *around[-2:]]


class DiMOOModel(CheckpointModel):
    """A model of Lumina-DiMOO's class."""

    text_decoder = MaskedTextDecoder
    kept = (*FILES, "model_index.json", f"{VQ_FOLDER}/config.json")

    def write(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Writes the published layout, with the image tokenizer in its folder if it came from there."""
        super().write(folder, dtype)
        if f"{VQ_FOLDER}/config.json" in self.kept_files:
            path = make_folder(folder / VQ_FOLDER) / "diffusion_pytorch_model.safetensors"
            save_tensors(vqgan.tokenizer_tensors(self.vq_tokenizer, vqgan.DIFFUSERS), path)


class DiMOOFamily:
    """Opens checkpoints of Lumina-DiMOO's class."""

    files = (*FETCHED, "model_index.json", f"{VQ_FOLDER}/*.json", f"{VQ_FOLDER}/*.safetensors")

    def claims(self, config: Any) -> bool:
        """By its model_type and class."""
        named = config.get("architectures") if isinstance(config, dict) else None
        return isinstance(named, list) and CLASS_NAME in named and config.get("model_type") == MODEL_TYPE

    def load(
        self,
        folder: Path,
        config: Mapping[str, Any],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        vq_tokenizer: str | None = None,
    ) -> DiMOOModel:
        """Opens a checkpoint; see Family.load. vq_tokenizer is load_model's."""
        path, tokenizer = folder / "config.json", FileTokenizer(folder)
        with loading.errors_of(path):
            shape = llada.transformer_config(config, MODEL_TYPE, "Lumina-DiMOO")
        layout = make_layout(tokenizer, shape.vocab_size)
        parts = on_meta(lambda: {"transformer": Transformer(shape)}, path)

        def open_tokenizer(device: torch.device) -> VQGAN:
            beside = folder / VQ_FOLDER
            given = vq_tokenizer or (str(beside) if beside.is_dir() else VQ_TOKENIZER)
            source = find_folder(given, self.files, "image tokenizer")
            source = source / VQ_FOLDER if (source / VQ_FOLDER).is_dir() else source
            with loading.errors_of(source / "config.json"):
                of_codes = vqgan.diffusers_config(read_json(source / "config.json"))
            return vqgan.load_image_tokenizer(source, of_codes, vqgan.DIFFUSERS, device=device)

        load_parts(parts, folder, llada.published_tensors, "", dtype, device)
        settings = (layout, GRID * PIXELS_PER_TOKEN, PROMPTS, SAMPLING, open_tokenizer)
        return DiMOOModel(folder, parts, llada.published_tensors, tokenizer, *settings)


FAMILY = DiMOOFamily()


def make_layout(tokenizer: FileTokenizer, vocab_size: int, grid: tuple[int, int] = (GRID, GRID)) -> DiMOOLayout:
    """The vocabulary: special tokens by name, codes behind the tokenizer's.

    Raises: InputError if a token is missing, or no rows are left for codes.
    """
    offset = max(tokenizer.vocabulary.values()) + 1
    if offset >= vocab_size:
        raise InputError(
            f"{tokenizer.folder}: the tokenizer has {offset} ids, which leaves no codes in a vocabulary of {vocab_size}"
            "; give the tokenizer that belongs to the checkpoint"
        )
    return DiMOOLayout(
        vocab_size=vocab_size,
        code_offset=offset,
        image_grid=grid,
        drawing_ids=tuple(tokenizer.encode(DRAWING_SYSTEM)),
        seeing_ids=tuple(tokenizer.encode(SEEING_SYSTEM)),
        **{name: tokenizer.id(token) for name, token in TOKENS.items()},
    )
