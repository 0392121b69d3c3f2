"""Images as features: CLIP's patches through a projector into the width of the backbone, in Show-o's clip-vit variant.

Source: models/clip_encoder.py of Show-o (arXiv 2408.12528); the features are those of LLaVA (arXiv 2304.08485).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .files import InputError

if TYPE_CHECKING:
    from transformers import CLIPImageProcessorPil, CLIPVisionModel

CLIP_FILES = ("config.json", "preprocessor_config.json", "model*.safetensors*", "pytorch_model*.bin*")
"""What load_clip_encoder reads of a CLIP repository."""
_PREFIX = "mm_projector."
PROJECTOR_TENSORS = tuple(f"{_PREFIX}{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias"))
"""Published names of the projector's two linear layers."""
_BATCH_IMAGES = 32
_MAX_ASPECT = 8


class ClipEncoder(nn.Module):
    """Images -> features that stand in place of token embeddings.

    The tower ends with its second last layer, whose patches are the features.
    """

    def __init__(self, tower: CLIPVisionModel, processor: CLIPImageProcessorPil, mm_projector: nn.Sequential) -> None:
        super().__init__()
        self.tower, self.processor, self.mm_projector = tower, processor, mm_projector

    @property
    def num_features(self) -> int:
        """F, patches of an image."""
        return (self.tower.config.image_size // self.tower.config.patch_size) ** 2

    @property
    def hidden_size(self) -> int:
        """Width of a feature, that of the backbone."""
        return self.mm_projector[-1].out_features

    @torch.no_grad()
    def encode(self, images: Sequence[np.ndarray | Image.Image]) -> Tensor:
        """Features of images.

        Args:
            images: RGB uint8 [H, W, 3], or Pillow images, each of any size; CLIP's image processor resizes and crops.
        Returns: [n, num_features, hidden_size] on the weights' device, in their dtype.
        Raises: ValueError on an array of another shape or dtype.
        """
        weight = self.mm_projector[0].weight
        features = []
        for start in range(0, len(images), _BATCH_IMAGES):
            batch = [_to_pillow(image) for image in images[start : start + _BATCH_IMAGES]]
            pixels = self.processor(images=batch, return_tensors="pt")["pixel_values"]
            hidden = self.tower(pixels.to(weight.device, weight.dtype)).last_hidden_state
            features.append(self.mm_projector(hidden[:, 1:]))
        return torch.cat(features) if features else weight.new_zeros(0, self.num_features, self.hidden_size)


def load_clip_encoder(
    folder: str | Path, projector: Mapping[str, Tensor], *, device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ClipEncoder:  # fmt: skip
    """The encoder of a model from CLIP's published files and the projector of the model's checkpoint.

    Args:
        folder: CLIP as transformers keeps it (CLIP_FILES), the vision model alone or with the text model.
        projector: PROJECTOR_TENSORS, of linear layers [inner, width of CLIP] and [hidden_size, inner].
        device, dtype: where the weights go and what they are converted to; None takes those of the projector.
    Raises: InputError if a file or tensor is missing, damaged or not finite, or if the sizes do not fit.
    """
    mm_projector = _projector(projector, device, dtype)
    first = mm_projector[0].weight
    try:
        tower, processor = _clip(Path(folder), first.dtype)
    except InputError:
        raise
    except Exception as error:  # transformers and the weights' readers raise many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(f"{folder}: not a CLIP vision model ({reason}); restore it from its source") from error
    width = tower.config.hidden_size
    if first.shape[1] != width:
        raise InputError(
            f"{folder}: CLIP's width is {width}, the checkpoint's mm_projector expects {first.shape[1]}; "
            "give the CLIP model that the checkpoint was trained with"
        )
    encoder = ClipEncoder(tower.to(first.device), processor, mm_projector).eval().requires_grad_(False)
    for name, weight in encoder.named_parameters():
        if not weight.isfinite().all():
            where = "the checkpoint" if name.startswith(_PREFIX) else folder
            raise InputError(f"{where}: {name} holds NaN or infinity in {weight.dtype}; restore it from its source")
    return encoder


def _projector(
    tensors: Mapping[str, Tensor], device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Sequential:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    match [shapes.get(name) for name in PROJECTOR_TENSORS]:
        case [(inner, width), (first,), (outer, last), (end,)] if first == last == inner and end == outer:
            pass
        case _:
            inner = None
    if inner is None or len(shapes) != len(PROJECTOR_TENSORS):
        raise InputError(
            f"the checkpoint's projector: expected {', '.join(PROJECTOR_TENSORS)} of two linear layers, one after the "
            f"other, got {shapes}; restore the checkpoint from its source"
        )
    with torch.device("meta"):
        layers = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, outer))
    dtype = dtype or tensors[PROJECTOR_TENSORS[0]].dtype
    state = {name.removeprefix(_PREFIX): tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    layers.load_state_dict(state, assign=True)
    return layers


def _clip(folder: Path, dtype: torch.dtype) -> tuple[CLIPVisionModel, CLIPImageProcessorPil]:
    """The vision model without its last layer, which no feature needs, and the image processor."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    with _quiet_transformers():
        config = CLIPVisionConfig.from_pretrained(folder, local_files_only=True)
        config.num_hidden_layers -= 1
        processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        tower, loaded = CLIPVisionModel.from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, weights_only=True, output_loading_info=True
        )
    if loaded["missing_keys"]:
        raise InputError(f"{folder}: lacks {', '.join(sorted(loaded['missing_keys']))}; restore it from its source")
    expected = [1, 3, config.image_size, config.image_size]
    got = list(processor(images=Image.new("RGB", (2, 3)), return_tensors="pt")["pixel_values"].shape)
    if got != expected:
        raise InputError(
            f"{folder / 'preprocessor_config.json'}: makes images of {got[1:]}, CLIP's config.json says "
            f"{expected[1:]}; restore both from their source"
        )
    return tower, processor


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
