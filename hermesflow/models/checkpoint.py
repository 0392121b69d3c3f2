"""Shared by families of published checkpoints: kept files, image tokenizers, saving.

A checkpoint's layout says which published tensor is which part of the model; the model is saved in the layout that it
came in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hermesflow.engine.image_tokenizers.blocks import ImageTokenizer
from hermesflow.engine.token_layout import Layout
from hermesflow.engine.weights import WEIGHT_FILES, load_weights, save_tensors
from hermesflow.models.model import Model, PromptFormat
from hermesflow.models.text_tokenizers import FileTokenizer
from hermesflow.runtime.files import InputError, make_folder

FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Files of a checkpoint beside its weights; save writes back those that exist, unchanged."""
FETCHED = (*FILES, *WEIGHT_FILES, "*-of-*.safetensors", "*-of-*.bin")
Views = Callable[[nn.ModuleDict], dict[str, Tensor]]
"""Of a model's parts: the name of each published tensor -> the parameter, or the part of one, that it fills."""


class CheckpointModel(Model):
    """A model of a published checkpoint; its image tokenizer is opened when it is first needed."""

    kept = FILES
    """Files of the checkpoint that are saved as they were."""

    def __init__(
        self,
        folder: Path,
        parts: nn.ModuleDict,
        views: Views,
        text_tokenizer: FileTokenizer,
        layout: Layout,
        image_size: int,
        prompts: PromptFormat,
        sampling: Any,
        open_tokenizer: Callable[[torch.device], ImageTokenizer],
    ) -> None:
        """
        Args:
            folder: the checkpoint's.
            parts: its modules, "transformer" among them.
            views: of the parts, in the layout of the folder.
            text_tokenizer, layout, image_size, prompts, sampling: see Model.
            open_tokenizer: opens the image tokenizer on a device.
        """
        super().__init__(parts["transformer"], None, text_tokenizer, layout, image_size, prompts, sampling)
        self.folder, self.parts, self._views, self._open_tokenizer = folder, parts, views, open_tokenizer
        self.kept_files = {name: (folder / name).read_bytes() for name in self.kept if (folder / name).is_file()}

    @cached_property
    def vq_tokenizer(self) -> ImageTokenizer:
        """In fp32, since codes are discrete. Raises: InputError if it is unavailable or does not fit."""
        found = self._open_tokenizer(self.engine.device)
        rows, columns = self.layout.image_grid
        expected = (self.layout.codebook_size, self.image_size)
        if (found.config.codebook_size, columns * found.config.downsampling) != expected:
            raise InputError(
                f"{self.folder}: the image tokenizer has {found.config.codebook_size} codes and "
                f"{found.config.downsampling} pixels a token, the model {expected[0]} codes and {rows} x {columns} "
                f"tokens for {expected[1]} pixels; give the model's own"
            )
        return found

    def tokenizer_tensors(self) -> dict[str, Tensor]:
        """Those of the image tokenizer that the checkpoint's weights hold, under their published names."""
        return {}

    def write(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Writes the layout that the checkpoint came in, with one file of weights."""
        published = self.published_tensors()
        if dtype is not None:  # the image tokenizer stays as it is: in fewer bits images would get other codes
            published = {name: tensor.to(dtype) for name, tensor in published.items()}
        save_tensors(published | self.tokenizer_tensors(), folder / "model.safetensors")
        self.write_kept(folder)

    def published_tensors(self) -> dict[str, Tensor]:
        """Of all parts: the name of each published tensor -> the parameter, or the part of one, that it fills."""
        self.parts["transformer"] = self.transformer  # training may have put another in its place
        return self._views(self.parts)

    def write_kept(self, folder: Path) -> None:
        """Writes the files that were kept."""
        for name, data in self.kept_files.items():
            make_folder((folder / name).parent)
            (folder / name).write_bytes(data)


def load_parts(
    parts: nn.ModuleDict,
    path: Path,
    views: Views,
    ignored: str,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> None:
    """Fills parts from a file or a folder; see load_weights. Raises: InputError if the weights do not fit."""
    try:
        load_weights(parts, path, views, ignored=ignored, dtype=dtype, device=device)
    except ValueError as error:
        raise InputError(str(error)) from error
    parts.eval()


def on_meta(make: Callable[[], Mapping[str, nn.Module]], path: Path) -> nn.ModuleDict:
    """Modules without memory. Raises: InputError that names the file if their sizes do not fit together."""
    try:
        with torch.device("meta"):
            return nn.ModuleDict(make())
    except InputError:
        raise
    except (ValueError, TypeError, ArithmeticError, RuntimeError, LookupError) as error:
        raise InputError(f"{path}: not the shape of a model ({error!r:.200}); restore it from its source") from error
