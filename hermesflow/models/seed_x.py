"""SEED-X (arXiv 2404.14396): LLaMA-2 that sees features of Qwen-VL's tower, and regresses those of what it draws.

    FOLDER/  seed_x_i/ (or seed_x/, seed_x_edit/)  llm/config.json and weights, agent/pytorch_model.bin
             cvlm_llama2_tokenizer_100img_and_224loc_addpatch/  tokenizer.model, added_tokens.json
             QwenViT/qwen_vit_G.pt  the tower, as SEED-X's reload_qwen_vit.py writes it from Qwen-VL-Chat
             seed_detokenizer/first_stage/pytorch_model.bin  and SDXL in stable-diffusion-xl-base-1.0/ (else fetched)
             configs/  SEED-X's yaml files, where sizes that the weights do not tell are others than the published
             feature_noise.safetensors  what drawn features differ by (SeedXModel.calibrate_noise)

It sees an image in pieces, with their places; one that it draws is a run of known tokens, whose features SDXL makes an
image of. Names, prompts and defaults: src/ of SEED-X; sizes and the tower's formulas: its configs/.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor, nn

from hermesflow.engine.decoders.features import FeatureDecoder, FeatureNoise, FeatureSamplingParams, FeatureTransformer
from hermesflow.engine.engine import Engine
from hermesflow.engine.latents import pack_latents, unpack_latents
from hermesflow.engine.resampler import Resampler, places
from hermesflow.engine.token_layout import FeatureSpan, Ids, Layout
from hermesflow.engine.transformer import TransformerConfig
from hermesflow.engine.weights import own_tensors, read_tensors, save_tensors
from hermesflow.kernels.span_tree import Place
from hermesflow.models import llama, loading
from hermesflow.models.checkpoint import CheckpointModel, load_parts, on_meta
from hermesflow.models.hub import find_folder
from hermesflow.models.model import PromptFormat
from hermesflow.models.sdxl import FILES as SDXL_FILES
from hermesflow.models.sdxl import Detokenizer, load_detokenizer
from hermesflow.models.text_tokenizers import SentencePieceTokenizer
from hermesflow.runtime.files import InputError, make_folder, shown

TOKENIZER = "cvlm_llama2_tokenizer_100img_and_224loc_addpatch"
TOWER_FILE, DETOKENIZER_FILE = "QwenViT/qwen_vit_G.pt", "seed_detokenizer/first_stage/pytorch_model.bin"
SDXL, SDXL_FOLDER = "stabilityai/stable-diffusion-xl-base-1.0", "stable-diffusion-xl-base-1.0"
NOISE_FILE = "feature_noise.safetensors"
CONFIGS = {
    "agent": "configs/clm_models/agent_seed_x_i.yaml",
    "tower": "configs/visual_encoder/qwen_vitg_448.yaml",
    "adapter": "configs/sdxl_adapter/sdxl_qwen_vit_resampler_l4_q64_pretrain_no_normalize.yaml",
}
GRIDS = ((1, 1), (1, 2), (1, 3), (2, 1), (3, 1), (1, 4), (4, 1), (2, 2))
"""Columns and rows of pieces, in the published order, which decides ties."""
SAMPLING = FeatureSamplingParams(temperature=0.5)
WHITE_NOISE = 0.25
"""Standard deviation of the noise where none was calibrated."""
WEIGHTS = llama.weight_table("model.", "lm_head")
_OLD_BUFFERS = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's pixels."""
_TOWER_EPS, _RESAMPLER_EPS = 1e-6, 1e-5
_PIECES_PER_PASS = 8
_DEFAULTS = {"rms_norm_eps": 1e-5, "rope_theta": 10_000.0}


class Variant(NamedTuple):
    """How a published model is asked: what stands before an image that it sees, its prompts, and its drawing prompt."""

    before_seen: str
    prompts: PromptFormat
    drawing: str


_INSTRUCT = Variant(
    "[INST] ",
    PromptFormat(caption_question="Give a caption for this image.", question="{question} [/INST]\n",
                 max_caption_tokens=128, max_answer_tokens=128),
    "[INST] Generate an image: {caption} [/INST]\nHere is a picture.",
)  # fmt: skip
_BASE = Variant(
    "Question: ",
    PromptFormat(caption_question="Give a caption for this image.", question="{question}\nAnswer:",
                 max_caption_tokens=128, max_answer_tokens=128),
    "{caption}",
)  # fmt: skip
VARIANTS = {"seed_x_i": _INSTRUCT, "seed_x": _BASE, "seed_x_edit": _INSTRUCT}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What no file of weights tells."""

    image_size: int = 448
    tower_heads: int = 16
    input_heads: int = 32
    output_heads: int = 32
    adapter_heads: int = 16


@dataclass(frozen=True, kw_only=True)
class SeedXLayout(Layout):
    """LLaMA-2's vocabulary and what SEED-X adds behind it: num_image_tokens ids that an image always has, in order."""

    vocab_size: int
    num_image_tokens: int
    latent_size: int
    bos: int
    eot: int
    boi: int
    eoi: int
    begin_piece: int
    end_piece: int
    first_image_id: int
    before_seen: tuple[int, ...]
    """From the start to an image that is seen."""

    code_ids = None
    codebook_size = 0
    image_mode = prefix_mode = "causal"

    @property
    def image_grid(self) -> tuple[int, int]:
        """A square."""
        side = math.isqrt(self.num_image_tokens)
        return side, side

    @cached_property
    def text_ids(self) -> Ids:
        """All but those that images have."""
        images = range(self.first_image_id, self.first_image_id + self.num_image_tokens)
        apart = {*images, self.boi, self.eoi}
        return Ids([token for token in range(self.vocab_size) if token not in apart])

    @property
    def before_image(self) -> tuple[int, ...]:
        """<img>."""
        return (self.boi,)

    after_image = ()

    def image(self, codes: Sequence[int]) -> list[int]:
        """<img> and the image's ids, whatever its features are."""
        return [self.boi, *range(self.first_image_id, self.first_image_id + self.num_image_tokens)]

    def text_prompt(self, text_ids: Sequence[int]) -> list[int]:
        """Condition of an image: [bos, text]."""
        return [self.bos, *text_ids]

    def image_prefix(self, codes: Sequence[int]) -> list[int]:
        """It sees features alone."""
        raise ValueError("SEED-X: sees images by features, got codes")

    def feature_span(self, num_features: int) -> FeatureSpan:
        """<patch> features </patch> for each piece but the last, <img> features </img> for that."""
        count = self.num_image_tokens
        pieces, (_, *image) = num_features // count, self.image([])
        ids = [*[self.begin_piece, *image, self.end_piece] * (pieces - 1), self.boi, *image, self.eoi]
        rows = [1 + piece * (count + 2) + row for piece in range(pieces) for row in range(count)]
        return FeatureSpan(ids, rows, "causal", Place(), self.before_seen)

    def question(self, text_ids: Sequence[int]) -> list[int]:
        """The question, and what begins the answer."""
        return list(text_ids)


class QwenTower(nn.Module):
    """Pixels -> features, as Qwen-VL sees them (arXiv 2308.12966). Names are those of the published file."""

    def __init__(
        self,
        width: int,
        depth: int,
        mlp_size: int,
        patch: int,
        places: int,
        queries: int,
        features: int,
        num_heads: int,
    ) -> None:
        """
        Args:
            width, depth, mlp_size, num_heads: of the blocks.
            patch: pixels of a patch, in each direction.
            places: of its table, between which other numbers of patches interpolate.
            queries, features: how many features it gives, and their width.
        """
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(places, width))
        self.ln_pre = nn.LayerNorm(width, eps=_TOWER_EPS)
        self.transformer = nn.ModuleDict(
            {"resblocks": nn.ModuleList(_TowerBlock(width, mlp_size, num_heads) for _ in range(depth))}
        )
        self.attn_pool = Resampler(queries, features, width, max(1, features // 128), _TOWER_EPS)
        self.ln_post = nn.LayerNorm(features, eps=_TOWER_EPS)
        self.proj = nn.Parameter(torch.empty(features, features))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W], of CLIP's mean and deviation -> [B, queries, features]."""
        return self.ln_post(self.attn_pool(self.patches(pixels))) @ self.proj

    def patches(self, pixels: Tensor) -> Tensor:
        """[B, N, width]."""
        x = self.conv1(pixels)
        grid = (x.shape[2], x.shape[3])
        x = self.ln_pre(x.flatten(2).transpose(1, 2) + places(self.positional_embedding, grid))
        for block in self.transformer["resblocks"]:
            x = block(x)
        return x


class _TowerBlock(nn.Module):
    def __init__(self, width: int, mlp_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.ln_1, self.ln_2 = (nn.LayerNorm(width, eps=_TOWER_EPS) for _ in range(2))
        self.attn = nn.ModuleDict({"in_proj": nn.Linear(width, 3 * width), "out_proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, mlp_size), "c_proj": nn.Linear(mlp_size, width)})

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attn["in_proj"](self.ln_1(x)).unflatten(-1, (self.num_heads, 3, -1))  # a head's q, k, v together
        q, k, v = (part.transpose(1, 2) for part in heads.unbind(3))
        x = x + self.attn["out_proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class SeedXView(nn.Module):
    """The tower's features of pieces, and their places -> vectors of the language model."""

    def __init__(self, resampler: Resampler, width: int) -> None:
        super().__init__()
        self.input_resampler = resampler
        self.patch_pos_embed = nn.Parameter(torch.empty(4, width))

    def forward(self, features: Tensor, centers: Tensor) -> Tensor:
        """Features [P, queries, F] of pieces whose centers [P, 2] are (x, y) in [0, 1] -> [P, n, D]."""
        place = torch.cat([centers, 1 - centers], dim=1).to(self.patch_pos_embed) / 2 @ self.patch_pos_embed
        return self.input_resampler(features) + place[:, None]


class SeedXTransformer(FeatureTransformer):
    """The language model, and the resampler behind it."""

    def __init__(self, config: TransformerConfig, num_tokens: int, features: int, num_heads: int) -> None:
        super().__init__(config)
        self._sizes = num_tokens, features, num_heads
        self.feature_out = Resampler(num_tokens, features, config.hidden_size, num_heads, _RESAMPLER_EPS)
        self.noise = FeatureNoise(torch.empty(1))

    def skeleton(self) -> SeedXTransformer:
        """See Transformer."""
        made = SeedXTransformer(self.config, *self._sizes)
        made.noise = self.noise
        return made

    def features(self, hidden: Tensor) -> Tensor:
        """See FeatureTransformer."""
        return self.feature_out(hidden).float()


class SeedXModel(CheckpointModel):
    """A model of SEED-X's; where others have codes it has features, packed (engine/latents.py)."""

    image_decoder = FeatureDecoder
    views_codes = False
    kept = tuple(CONFIGS.values())
    variant: str
    sizes: Sizes

    @property
    def tower(self) -> QwenTower:
        """What it sees through."""
        return self.parts["tower"]

    @property
    def vq_tokenizer(self) -> Detokenizer:
        """What draws. Raises: InputError if it is unavailable or does not fit."""
        return self._detokenizer

    @cached_property
    def _detokenizer(self) -> Detokenizer:
        return self._open_tokenizer(self.engine.device)

    @property
    def num_features(self) -> int:
        """F of an image that fits: it is one piece, which is seen twice."""
        return 2 * self.layout.num_image_tokens

    def set_image_size(self, size: int) -> None:
        """See Model; SDXL draws any multiple of 64 pixels."""
        if size < 64 or size % 64:
            raise ValueError("expected a multiple of 64 pixels; give one")
        self.image_size = size

    def whole_prompt(self, text: str) -> list[int]:
        """Text ids of an image's prompt, with what the model expects around it."""
        return self.encode_text(VARIANTS[self.variant].drawing.format(caption=text).rstrip())

    def question_prompt(self, question: str) -> list[int]:
        """Text ids of a question, likewise; it follows an image."""
        return self.encode_text(self.prompts.question.format(question=question).lstrip())

    def views(self, images: Iterable[Image.Image]) -> Iterator[tuple[Sequence[int], Tensor, Engine]]:
        """See Model: images keep their shape, in as many pieces as suit it."""
        cut, groups = [cut_image(image, self.sizes.image_size) for image in images], {}
        for number, (pixels, _) in enumerate(cut):
            groups.setdefault(len(pixels), []).append(number)
        for numbers in groups.values():
            yield numbers, torch.stack([self._see(*cut[number]) for number in numbers]), self.engine

    def view_pixels(self, images: np.ndarray) -> Tensor:
        """Features [n, F, D] of images that fit."""
        cut = [cut_image(Image.fromarray(image), self.sizes.image_size) for image in images]
        weight = self.parts["view"].patch_pos_embed
        found = [self._see(*pieces) for pieces in cut]
        return torch.stack(found) if found else weight.new_zeros(0, self.num_features, weight.shape[1])

    @torch.no_grad()
    def _see(self, pieces: np.ndarray, centers: np.ndarray) -> Tensor:
        """Vectors [F, D] of an image's pieces. The two of an image that is not cut are one."""
        once = slice(1, 2) if len(pieces) == 2 else slice(None)
        features = self.look(pieces[once]).expand(len(pieces), -1, -1)
        return self.parts["view"](features, torch.from_numpy(centers).to(features.device)).flatten(0, 1)

    @torch.no_grad()
    def look(self, pieces: np.ndarray) -> Tensor:
        """The tower's features [P, queries, F] of pieces, uint8 [P, S, S, 3]."""
        weight, pixels = self.tower.proj, torch.from_numpy(np.ascontiguousarray(pieces)).permute(0, 3, 1, 2)
        mean, std = (weight.new_tensor(values)[:, None, None] for values in (_MEAN, _STD))
        batches = pixels.split(_PIECES_PER_PASS)
        return torch.cat([self.tower((batch.to(weight) / 255 - mean) / std) for batch in batches])

    @torch.no_grad()
    def encode_images(self, images: np.ndarray) -> Tensor:
        """uint8 [n, H, W, 3] -> packed features int64 [n, M], those that the model would draw them by."""
        if not len(images):
            return torch.zeros(0, self.layout.code_length, dtype=torch.int64)
        size = (self.sizes.image_size,) * 2
        whole = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in images]
        return pack_latents(self.pooled(self.look(np.stack(whole))))

    def pooled(self, features: Tensor) -> Tensor:
        """The tower's features [P, queries, F] -> [P, n, F]: means of consecutive ones."""
        return features.float().unflatten(1, (self.layout.num_image_tokens, -1)).mean(2)

    @cached_property
    def negative_features(self) -> Tensor:
        """fp32 [n, F], of nothing: what guidance leads away from."""
        size = self.sizes.image_size
        with torch.no_grad():
            return self.pooled(self.tower(self.tower.proj.new_zeros(1, 3, size, size)))[0]

    @torch.no_grad()
    def decode_images(self, codes: Tensor, height: int | None = None, width: int | None = None) -> np.ndarray:
        """Packed features int64 [n, M] -> uint8 [n, image_size, image_size, 3], by SDXL."""
        features = unpack_latents(codes.to(self.tower.proj.device), self.layout.latent_size)
        images = self.vq_tokenizer.decode(features, self.negative_features, self.image_size)
        return images.permute(0, 2, 3, 1).cpu().numpy()

    def calibrate_noise(self, images: np.ndarray, captions: Sequence[str], rank: int = 256) -> None:
        """Candidates differ from now on in the directions in which records do, and by as much.

        Args:
            images: uint8 [n, H, W, 3] of records, more than rank.
            captions: theirs.
            rank: directions, those of the largest deviations of an image's features from what the model draws.
        Raises: ValueError on fewer images than that, or another number of captions.
        """
        if not 1 <= rank < len(images) or len(captions) != len(images):
            raise ValueError(
                f"calibrate_noise: expected more images than rank {rank}, and a caption each, got {len(images)} and "
                f"{len(captions)}"
            )
        with torch.inference_mode():
            drawn = self.engine.image_decoder.features([self.image_prompt(caption) for caption in captions])
            seen = unpack_latents(self.encode_images(images), self.layout.latent_size)
            rest = (seen.to(drawn) - drawn).flatten(1).double()
            rest = rest - rest.mean(0)
            values, vectors = torch.linalg.eigh(rest @ rest.T)  # of the records, which are fewer than numbers
            lengths = values[-rank:].clamp(min=1e-12).sqrt()
            directions = (vectors[:, -rank:].T @ rest) / lengths[:, None]
        found = FeatureNoise((lengths / len(rest) ** 0.5).float().clone(), directions.float().clone())
        self.transformer.noise = found.to(self.tower.proj.device)

    def write(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Writes the published layout; what is not trained is linked to where it was, or copied."""
        language_model, agent, tower = _files(folder, self.variant)
        of_body, of_agent, _ = _views(self.published_parts())
        save_tensors(of_body, make_folder(language_model) / "pytorch_model.bin", dtype)
        save_tensors(of_agent, make_folder(agent.parent) / agent.name, dtype)
        source = _files(self.folder, self.variant)[0]
        for name in ("config.json", "generation_config.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, language_model / name)
        self.write_kept(folder)
        noise = self.transformer.noise
        if noise.directions is not None:
            save_tensors({"scales": noise.scales, "directions": noise.directions}, folder / NOISE_FILE)
        for name in (TOKENIZER, tower.relative_to(folder).parent, DETOKENIZER_FILE, SDXL_FOLDER):
            _link(self.folder / name, folder / name)

    def published_parts(self) -> nn.ModuleDict:
        """All parts; training may have put another transformer in its place."""
        self.parts["transformer"] = self.transformer
        return self.parts

    def modules(self) -> tuple[nn.Module, ...]:
        """All that is the model's own; SDXL stays as it is."""
        noise = nn.ParameterDict(
            {name: nn.Parameter(value, False) for name, value in self.transformer.noise.named_buffers()}
        )
        return self.transformer, self.tower, self.parts["view"], noise


def cut_image(image: Image.Image, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An image's pieces uint8 [P, size, size, 3], row by row and then the whole, and their centers fp32 [P, 2]."""
    image = image.convert("RGB")
    columns, rows = best_grid(*image.size, size)
    stretched = np.asarray(image.resize((columns * size, rows * size), Image.Resampling.BICUBIC))
    pieces = stretched.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    whole = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    centers = [((column + 0.5) / columns, (row + 0.5) / rows) for row in range(rows) for column in range(columns)]
    return np.concatenate([pieces, whole[None]]), np.array([*centers, (0.5, 0.5)], dtype=np.float32)


def best_grid(width: int, height: int, size: int) -> tuple[int, int]:
    """Columns and rows of pieces of that size for an image of that many pixels: the grid that keeps most of its pixels,
    or the one nearest to its shape, if that is smaller."""

    def kept(grid: tuple[int, int]) -> tuple[int, int]:
        full = grid[0] * size, grid[1] * size
        scale = min(full[0] / width, full[1] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - full[0] * full[1]

    def distance(grid: tuple[int, int]) -> tuple[float, float]:
        return _apart(grid[1] / grid[0], height / width), _apart(grid[0] * grid[1] * size**2, width * height)

    most, nearest = max(GRIDS, key=kept), min(GRIDS, key=distance)
    return nearest if most[0] * most[1] > nearest[0] * nearest[1] else most


def _apart(one: float, other: float) -> float:
    return max(one, other) / min(one, other)


class SeedXFamily:
    """Opens folders of SEED-X's."""

    markers = tuple(f"{name}/llm/config.json" for name in VARIANTS)
    files = (
        "*/llm/*.json", "*/llm/*.bin", "*/llm/*.safetensors", "*/agent/pytorch_model.bin", f"{TOKENIZER}/*",
        TOWER_FILE, DETOKENIZER_FILE, "configs/*", NOISE_FILE,
    )  # fmt: skip

    def claims(self, config: Any) -> bool:
        """By the language model's type."""
        return isinstance(config, dict) and config.get("model_type") == "llama"

    def load(
        self,
        folder: Path,
        config: Mapping[str, Any],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        vq_tokenizer: str | None = None,
    ) -> SeedXModel:
        """Opens a folder; see Family.load. vq_tokenizer is load_model's: SDXL's folder or hub id."""
        variant = next(name for name in VARIANTS if (folder / name / "llm/config.json").is_file())
        sources, tokenizer, sizes = _files(folder, variant), SentencePieceTokenizer(folder / TOKENIZER), _sizes(folder)
        with loading.errors_of(sources[0] / "config.json"):
            shape = llama.transformer_config(config, "llama", _DEFAULTS, config.get("vocab_size"), "SEED-X")
        parts = on_meta(lambda: _parts(sources, shape, sizes), sources[1])
        for number, (source, ignored) in enumerate(zip(sources, (_OLD_BUFFERS, "", ""), strict=True)):
            load_parts(parts, source, lambda parts, number=number: _views(parts)[number], ignored, dtype, device)
        transformer = parts["transformer"]
        transformer.noise = _noise(folder, transformer, device)
        for part in (parts["tower"], parts["view"]):
            part.requires_grad_(False)
        num_tokens, features, _ = transformer._sizes
        layout = make_layout(tokenizer, shape.vocab_size, num_tokens, features, VARIANTS[variant].before_seen)

        def open_tokenizer(device: torch.device) -> Detokenizer:
            beside = folder / SDXL_FOLDER
            source = vq_tokenizer or (str(beside) if beside.is_dir() else SDXL)
            found = find_folder(source, SDXL_FILES, "SDXL", SDXL)
            weights = folder / DETOKENIZER_FILE
            return load_detokenizer(weights, found, sizes.adapter_heads, parts["tower"].proj.dtype, device)

        model = SeedXModel(
            folder, parts, _all_views, tokenizer, layout, 1024, VARIANTS[variant].prompts, SAMPLING, open_tokenizer
        )
        model.variant, model.sizes = variant, sizes
        return model


FAMILY = SeedXFamily()


def make_layout(
    tokenizer: SentencePieceTokenizer, vocab_size: int, num_tokens: int, features: int, before_seen: str
) -> SeedXLayout:
    """Added tokens by name. Raises: InputError if one is missing, or the vocabulary is another's."""
    if tokenizer.size != vocab_size:
        raise InputError(
            f"{tokenizer.folder}: has {tokenizer.size} ids, the language model {vocab_size}; give the tokenizer that "
            "belongs to the checkpoint"
        )
    names = {"boi": "<img>", "eoi": "</img>", "begin_piece": "<patch>", "end_piece": "</patch>"}
    ids = {name: tokenizer.id(token) for name, token in names.items()}
    images = [tokenizer.id(f"<img_{number:05d}>") for number in range(num_tokens)]
    if images != list(range(images[0], images[0] + num_tokens)):
        raise InputError(f"{tokenizer.folder}: expected the ids of <img_00000> and so on in a row; restore it")
    return SeedXLayout(
        vocab_size=vocab_size, num_image_tokens=num_tokens, latent_size=features, bos=tokenizer.bos, eot=tokenizer.eos,
        first_image_id=images[0], before_seen=(tokenizer.bos, *tokenizer.encode(before_seen.rstrip())), **ids,
    )  # fmt: skip


def _files(folder: Path, variant: str) -> tuple[Path, Path, Path]:
    """Of the language model (a folder), the agent and the tower."""
    return folder / variant / "llm", folder / variant / "agent/pytorch_model.bin", folder / TOWER_FILE


def _sizes(folder: Path) -> Sizes:
    """The published ones, or those of SEED-X's yaml files. Raises: InputError if a file is damaged."""
    given = {}
    for kind, name in CONFIGS.items():
        try:
            given[kind] = yaml.safe_load((folder / name).read_text()) if (folder / name).is_file() else {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InputError(f"{folder / name}: is no YAML that can be read; restore it from its source") from error
    usual = Sizes()
    try:
        agent, adapter = given["agent"], given["adapter"]
        found = Sizes(
            image_size=given["tower"].get("image_size", usual.image_size),
            tower_heads=given["tower"].get("heads", usual.tower_heads),
            input_heads=agent.get("input_resampler", {}).get("num_heads", usual.input_heads),
            output_heads=agent.get("output_resampler", {}).get("num_heads", usual.output_heads),
            adapter_heads=adapter.get("resampler", {}).get("heads", usual.adapter_heads),
        )
    except AttributeError as error:
        raise InputError(f"{folder / 'configs'}: not SEED-X's yaml files; restore them from their source") from error
    for name, value in vars(found).items():
        if type(value) is not int or not 1 <= value <= 2**12:
            raise InputError(f"{folder / 'configs'}: {name} is {shown(value)}; restore the files from their source")
    return found


def _parts(sources: tuple[Path, Path, Path], shape: TransformerConfig, sizes: Sizes) -> dict[str, nn.Module]:
    """Modules of the sizes that the weights have."""
    _, agent, tower = ({} if path.is_dir() else _shapes(path) for path in sources)
    (queries, width), (_, features) = (agent[f"{side}_resampler.query"] for side in ("input", "output"))
    of_tower, _, patch, _ = tower["conv1.weight"]
    block = "transformer.resblocks.{}.ln_1.weight"
    return {
        "transformer": SeedXTransformer(shape, queries, features, sizes.output_heads),
        "view": SeedXView(Resampler(queries, width, features, sizes.input_heads, _RESAMPLER_EPS), width),
        "tower": QwenTower(
            width=of_tower, depth=next(number for number in range(len(tower)) if block.format(number) not in tower),
            mlp_size=tower["transformer.resblocks.0.mlp.c_fc.weight"][0], patch=patch,
            places=tower["positional_embedding"][0], queries=tower["attn_pool.query"][0], features=features,
            num_heads=sizes.tower_heads,
        ),
    }  # fmt: skip


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in read_tensors(path).items()}


def _views(parts: nn.ModuleDict) -> tuple[dict[str, Tensor], ...]:
    """Published names -> parameters, of the language model, the agent and the tower."""
    transformer = parts["transformer"]
    resampler = {f"output_resampler.{name}": part for name, part in own_tensors(transformer.feature_out).items()}
    agent = own_tensors(parts["view"]) | resampler
    return loading.published_tensors(WEIGHTS, transformer), agent, own_tensors(parts["tower"])


def _all_views(parts: nn.ModuleDict) -> dict[str, Tensor]:
    """All of them, the language model's as fine-tuned checkpoints name them."""
    body, agent, tower = _views(parts)
    return {f"llm.{name}": part for name, part in body.items()} | agent | tower


def _noise(folder: Path, transformer: SeedXTransformer, device: torch.device | str | None) -> FeatureNoise:
    """That of the folder, or white noise. Raises: InputError if it does not fit."""
    path, (num_tokens, features, _) = folder / NOISE_FILE, transformer._sizes
    if not path.is_file():
        return FeatureNoise(torch.tensor([WHITE_NOISE], device=device))
    try:
        tensors = {name: tensor.float() for name, tensor in read_tensors(path).items()}
    except ValueError as error:
        raise InputError(str(error)) from error
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    rank = shapes.get("scales", [0])[0]
    is_finite = all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    if shapes != {"scales": [rank], "directions": [rank, num_tokens * features]} or not is_finite:
        raise InputError(f"{path}: holds {shapes}, no noise of this model's features; calibrate it anew")
    return FeatureNoise(tensors["scales"].to(device), tensors["directions"].to(device))


def _link(source: Path, target: Path) -> None:
    """A file, or all files below a folder, under another name: the same ones where the file system can."""
    if not source.exists():
        return
    for file in [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]:
        to = target if source.is_file() else target / file.relative_to(source)
        make_folder(to.parent)
        try:
            os.link(file.resolve(), to)
        except OSError:
            shutil.copyfile(file, to)
