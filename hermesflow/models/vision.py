"""Images as features: CLIP's patches through a projector into the width of the backbone, in Show-o's clip-vit variant.

Source: models/clip_encoder.py of Show-o (arXiv 2408.12528); the features are those of LLaVA (arXiv 2304.08485).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hermesflow.engine.weights import WEIGHT_DTYPES, read_tensors
from hermesflow.runtime.files import InputError, reason_of

if TYPE_CHECKING:
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

CLIP_FILES = ("config.json", "preprocessor_config.json", "model*.safetensors*", "pytorch_model*.bin*")
"""What load_clip_encoder reads of a CLIP repository."""
_BATCH_IMAGES = 32
_MAX_ASPECT = 8
_LIMITS = {
    "hidden_size": 2**16, "intermediate_size": 2**18, "num_hidden_layers": 2**10, "num_attention_heads": 2**10,
    "image_size": 2**12, "patch_size": 2**12,
}  # fmt: skip


class ClipEncoder:
    """Images -> features that stand in place of token embeddings.

    The tower ends with CLIP's second last layer, whose patches are projected to features.
    """

    def __init__(self, tower: CLIPVisionModel, processor: CLIPImageProcessorPil, projector: nn.Sequential) -> None:
        self.tower, self.processor, self.projector = tower, processor, projector

    @property
    def num_features(self) -> int:
        """F, patches of an image."""
        return (self.tower.config.image_size // self.tower.config.patch_size) ** 2

    @torch.no_grad()
    def encode(self, images: Sequence[np.ndarray | Image.Image]) -> Tensor:
        """Features of images.

        Args:
            images: RGB uint8 [H, W, 3], or Pillow images, each of any size; CLIP's image processor resizes and crops.
        Returns: [n, num_features, hidden_size of the backbone] on the projector's device, in its dtype.
        Raises: ValueError on an array of another shape or dtype.
        """
        last = self.projector[-1].weight
        features = [last.new_zeros(0, self.num_features, len(last))]
        for start in range(0, len(images), _BATCH_IMAGES):
            batch = [_to_pillow(image) for image in images[start : start + _BATCH_IMAGES]]
            pixels = self.processor(images=batch, return_tensors="pt")["pixel_values"]
            hidden = self.tower(pixels.to(self.tower.device, self.tower.dtype)).last_hidden_state
            features.append(self.projector(hidden[:, 1:].to(last)))
        return torch.cat(features)


def load_clip_encoder(folder: str | Path, projector: nn.Sequential) -> ClipEncoder:
    """The encoder of a model from CLIP's published files, on the device and in the dtype of the projector.

    Args:
        folder: CLIP as transformers keeps it (CLIP_FILES), the vision model alone or with the text model.
        projector: the model's own Linear, GELU, Linear from CLIP's width to the backbone's; it is shared, not copied.
    Raises: InputError if a file of CLIP is missing, damaged or holds NaN, or does not fit the others or the projector.
    """
    folder, first = Path(folder), projector[0].weight
    try:
        tower, processor = _clip(folder, first.dtype)
    except InputError:
        raise
    except Exception as error:  # transformers and the weights' readers raise many types
        reason = reason_of(error)
        raise InputError(f"{folder}: not a CLIP vision model ({reason}); restore it from its source") from error
    width = tower.config.hidden_size
    if first.shape[1] != width:
        raise InputError(
            f"{folder}: CLIP's width is {width}, the checkpoint's projector expects {first.shape[1]}; "
            "give the CLIP model that the checkpoint was trained with"
        )
    return ClipEncoder(tower.to(first.device), processor, projector)


def _clip(folder: Path, dtype: torch.dtype) -> tuple[CLIPVisionModel, CLIPImageProcessorPil]:
    """The vision model without its last layer, which no feature needs, and the image processor."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    with _quiet_transformers():
        config = CLIPVisionConfig.from_pretrained(folder, local_files_only=True)
        processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        _check_sizes(folder, config, processor)
        config.num_hidden_layers -= 1
        try:
            tensors = read_tensors(folder)
        except ValueError as error:
            raise InputError(str(error)) from error
        for name, tensor in tensors.items():
            if tensor.dtype not in WEIGHT_DTYPES and not name.endswith("position_ids"):
                raise InputError(f"{folder}: {name} is {tensor.dtype}, no floating point; restore it from its source")
        tower, loaded = CLIPVisionModel.from_pretrained(
            None, config=config, dtype=dtype, state_dict=tensors, output_loading_info=True
        )
    if loaded["missing_keys"]:
        raise InputError(f"{folder}: lacks {', '.join(sorted(loaded['missing_keys']))}; restore it from its source")
    for name, weight in tower.named_parameters():
        if not weight.isfinite().all():
            raise InputError(f"{folder}: {name} holds NaN or infinity in {dtype}; restore it from its source")
    expected = [1, 3, config.image_size, config.image_size]
    pixels = processor(images=Image.new("RGB", (2, 3)), return_tensors="pt")["pixel_values"]
    if list(pixels.shape) != expected or not pixels.isfinite().all():
        got = list(pixels.shape[1:]) if pixels.isfinite().all() else "NaN or infinity"
        raise InputError(
            f"{folder / 'preprocessor_config.json'}: makes images of {got}, CLIP's config.json says "
            f"{expected[1:]}; restore both from their source"
        )
    return tower.eval().requires_grad_(False), processor


def _check_sizes(folder: Path, config: CLIPVisionConfig, processor: CLIPImageProcessorPil) -> None:
    """Refuses sizes whose model or images would be endless, before any is made."""
    sides = [side for sizes in (processor.size, processor.crop_size) for side in dict(sizes or {}).values()]
    for name, values, limit in (
        *((f"config.json: {name}", [getattr(config, name)], limit) for name, limit in _LIMITS.items()),
        ("preprocessor_config.json: size", sides, _LIMITS["image_size"]),
    ):
        if not all(type(value) is int and 1 <= value <= limit for value in values):
            raise InputError(f"{folder}/{name}: expected 1 to {limit}, got {values}; restore it from its source")


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar and no table of the tensors that are left out on purpose: the text model, the last layer."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _to_pillow(image: Any) -> Image.Image:
    if not isinstance(image, Image.Image):
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(
                f"ClipEncoder.encode: expected RGB images uint8 [H, W, 3], got {image.dtype} {list(image.shape)}; "
                "convert them first"
            )
        image = Image.fromarray(image)
    # The processor makes the short side as long as CLIP's image, which would blow up a narrow strip beyond memory.
    longest = _MAX_ASPECT * min(image.size)
    left, top = (max(side - longest, 0) // 2 for side in image.size)
    if left or top:
        image = image.crop((left, top, left + min(image.width, longest), top + min(image.height, longest)))
    return image.convert("RGB")
