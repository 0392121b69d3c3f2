"""Show-o2 (arXiv 2506.15564): Qwen2.5, and behind it a head that gives the velocities of a flow.

    FOLDER/  config.json (class Showo2Qwen2_5)  pytorch_model.bin (or any of WEIGHT_FILES)
             llm/  configuration and tokenizer of the language model    (else llm_model_path is fetched)
             siglip/config.json  the shape of SigLIP                    (needed for one that is not published)
             Wan2.1_VAE.pth  the autoencoder of Wan2.1                  (else AUTOENCODER is fetched)

An image is a token of its time and its latents, whose embeddings see each other in SigLIP's layers first; it is drawn
and seen alike, without noise where it is seen. Names, prompts and defaults: show-o2/models, inference_t2i.py,
inference_mmu.py and README of Show-o2. There time runs from the noise, here from the image.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hermesflow.engine.decoders.flow import FlowSamplingParams
from hermesflow.engine.flow_head import FlowHead, FlowHeadConfig
from hermesflow.engine.image_tokenizers.wan import UNUSED, WanAutoencoder, WanAutoencoderConfig
from hermesflow.engine.kv_cache import KVCache
from hermesflow.engine.latents import (
    FlowTransformer,
    NoisedImages,
    joined_embeds,
    patchify,
    time_waves,
    unpack_latents,
    unpatchify,
)
from hermesflow.engine.resampler import places
from hermesflow.engine.token_layout import FeatureSpan, Ids, Layout, check_grid
from hermesflow.engine.transformer import Block, Embeds, TransformerConfig
from hermesflow.engine.weights import WEIGHT_FILES, own_tensors, read_tensors, save_tensors
from hermesflow.kernels.span_tree import Place, SpanTree
from hermesflow.models import loading
from hermesflow.models.checkpoint import load_parts, on_meta
from hermesflow.models.hub import find_folder
from hermesflow.models.latent_model import PATCH, LatentModel
from hermesflow.models.model import PromptFormat
from hermesflow.models.showo import LLM_FILES, LLM_FOLDER, find_language_model
from hermesflow.models.siglip import see
from hermesflow.models.text_tokenizers import FileTokenizer
from hermesflow.runtime.files import InputError, make_folder, read_json, shown

CLASS_NAME = "Showo2Qwen2_5"
WEIGHTS_FILE, SIGLIP_FILE = "pytorch_model.bin", "siglip/config.json"
AUTOENCODER, AUTOENCODER_FILE = "Wan-AI/Wan2.1-T2V-14B", "Wan2.1_VAE.pth"
"""Hub id of the autoencoder, and its file there and beside the checkpoint."""
PROMPTS = PromptFormat(
    caption_question="Give a caption for this image.",
    question="{question}",
    answer="{answer}",
    max_prompt_tokens=290,
    max_caption_tokens=128,
    max_answer_tokens=300,
)
SAMPLING = FlowSamplingParams(num_steps=50, guidance_scale=6.5, shift=3.0)
TOKENS = {"bos": "<|im_start|>", "eot": "<|im_end|>", "boi": "<|vision_start|>", "eoi": "<|vision_end|>",
          "pad": "<|image_pad|>"}  # fmt: skip
SYSTEM, USER, ASSISTANT = "system\nYou are a helpful assistant.", "user\n", "assistant\n"
_LAYERS, _SIGLIP, _HEAD = "showo.model.layers.*", "und_trans.layers.*", "diffusion_head_a.*"
WEIGHTS = {
    "embed": ["showo.model.embed_tokens"],
    "blocks.*.attention_norm": [f"{_LAYERS}.input_layernorm"],
    "blocks.*.attention.qkv": [f"{_LAYERS}.self_attn.{name}_proj" for name in "qkv"],
    "blocks.*.attention.out": [f"{_LAYERS}.self_attn.o_proj"],
    "blocks.*.mlp_norm": [f"{_LAYERS}.post_attention_layernorm"],
    "blocks.*.mlp.up": [f"{_LAYERS}.mlp.gate_proj", f"{_LAYERS}.mlp.up_proj"],
    "blocks.*.mlp.down": [f"{_LAYERS}.mlp.down_proj"],
    "norm": ["showo.model.norm"],
    "head": ["showo.lm_head"],
}
HEAD_WEIGHTS = {
    "inputs.0": ["diff_proj.0"],
    "inputs.2": ["diff_proj.2"],
    "blocks.*.attention_norm": [f"{_HEAD}.input_layernorm"],
    "blocks.*.attention.qkv": [f"{_HEAD}.self_attn.{name}_proj" for name in "qkv"],
    "blocks.*.attention.out": [f"{_HEAD}.self_attn.o_proj"],
    "blocks.*.attention.q_norm": [f"{_HEAD}.self_attn.q_norm"],
    "blocks.*.attention.k_norm": [f"{_HEAD}.self_attn.k_norm"],
    "blocks.*.mlp_norm": [f"{_HEAD}.post_attention_layernorm"],
    "blocks.*.mlp.up": [f"{_HEAD}.mlp.gate_proj", f"{_HEAD}.mlp.up_proj"],
    "blocks.*.mlp.down": [f"{_HEAD}.mlp.down_proj"],
    "blocks.*.modulation.1": [f"{_HEAD}.adaLN_modulation.1"],
    "norm": ["diffusion_head_b.norm_final"],
    "modulation.1": ["diffusion_head_b.adaLN_modulation.1"],
    "out": ["diffusion_head_b.linear"],
}
VISION_WEIGHTS = {
    "seen": ["image_embedder_und.proj"],
    "drawn": ["image_embedder_gen.proj"],
    "position": ["position_embedding"],
    "blocks.*.attention_norm": [f"{_SIGLIP}.layer_norm1"],
    "blocks.*.attention.qkv": [f"{_SIGLIP}.self_attn.{name}_proj" for name in "qkv"],
    "blocks.*.attention.out": [f"{_SIGLIP}.self_attn.out_proj"],
    "blocks.*.mlp_norm": [f"{_SIGLIP}.layer_norm2"],
    "blocks.*.mlp.up": [f"{_SIGLIP}.mlp.fc1"],
    "blocks.*.mlp.down": [f"{_SIGLIP}.mlp.fc2"],
    "fusion.0": ["fusion_proj.0"],
    "fusion.1": ["fusion_proj.1"],
    "fusion.3": ["fusion_proj.3"],
    "time.0": ["time_embed.mlp.0"],
    "time.2": ["time_embed.mlp.2"],
    "time_token": ["time_embed_proj"],
}
_SETTINGS = {
    "hidden_size": "@hidden_size",
    "num_layers": "@num_hidden_layers",
    "num_heads": "@num_attention_heads",
    "num_kv_heads": "@num_key_value_heads",
    "mlp_size": "@intermediate_size",
    "norm_eps": "@rms_norm_eps",
    "rope_theta": "@rope_theta",
    "activation": "@hidden_act",
    "tie_embeddings": "@tie_word_embeddings",
    "norm": "rmsnorm",
    "gated": True,
    "bias": False,
    "qkv_bias": True,
}
_SUPPORTED = {"patch_size": PATCH, "image_latent_dim": WanAutoencoderConfig.latent_channels, "add_time_embeds": True}
_SIGLIP_SHAPES = {"google/siglip-so400m-patch14-384": (1152, 16)}
"""Width and heads, by clip_pretrained_model_path."""
_IMAGES_PER_PASS = 8


@dataclass(frozen=True, kw_only=True)
class Showo2Layout(Layout):
    """Qwen2.5's vocabulary and what Show-o2 adds behind it; an image is its time and its latents."""

    vocab_size: int
    image_grid: tuple[int, int]
    bos: int
    eot: int
    boi: int
    eoi: int
    pad: int
    before_seen: tuple[int, ...]
    """From the start to boi and the time of an image that is seen."""
    before_answer: tuple[int, ...]

    code_ids = None
    codebook_size = 0
    latent_size = WanAutoencoderConfig.latent_channels * PATCH**2

    @property
    def num_image_tokens(self) -> int:
        """Latents of an image."""
        return self.image_grid[0] * self.image_grid[1]

    @cached_property
    def text_ids(self) -> Ids:
        """All."""
        return Ids(range(self.vocab_size))

    @property
    def before_image(self) -> tuple[int, ...]:
        """A pad in the place of the time."""
        return (self.pad,)

    after_image = ()

    def of_grid(self, grid: tuple[int, int]) -> Showo2Layout:
        """The same for images of so many rows and columns of latents."""
        check_grid("Show-o2", grid)
        return replace(self, image_grid=tuple(grid))

    def image(self, codes: Sequence[int]) -> list[int]:
        """Pads, where embeddings stand."""
        return [self.pad] * (1 + len(codes))

    def text_prompt(self, text_ids: Sequence[int]) -> list[int]:
        """Condition of an image: [bos, text, boi]."""
        return [self.bos, *text_ids, self.boi]

    def image_prefix(self, codes: Sequence[int]) -> list[int]:
        """It sees features alone."""
        raise ValueError("Show-o2: sees images by features, got codes")

    def feature_span(self, num_features: int) -> FeatureSpan:
        """[latents, eoi], full, behind all that images have before them. The time is there, as in inference_mmu.py; in
        training the original has it in the full span, and eoi behind it."""
        return FeatureSpan(
            [*[self.pad] * (num_features - 1), self.eoi], range(num_features - 1), "full", Place(), self.before_seen, 1
        )

    def question(self, text_ids: Sequence[int]) -> list[int]:
        """[question, start of the answer]."""
        return [*text_ids, *self.before_answer]


class Showo2Vision(nn.Module):
    """Latents, noised or not, and their time -> their embeddings."""

    def __init__(self, config: TransformerConfig, num_places: int, width: int, time_width: int) -> None:
        """
        Args:
            config: of SigLIP's layers.
            num_places: of its table, a square.
            width: of the language model.
            time_width: of the head.
        """
        super().__init__()
        channels = WanAutoencoderConfig.latent_channels
        self.config = config
        self.seen, self.drawn = (nn.Conv2d(channels, each, PATCH, stride=PATCH) for each in (config.hidden_size, width))
        self.position = nn.Embedding(num_places, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        both = config.hidden_size + width
        self.fusion = nn.Sequential(
            nn.RMSNorm(both, eps=1e-6), nn.Linear(both, width), nn.GELU(), nn.Linear(width, width)
        )
        self.time = nn.Sequential(nn.Linear(256, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
        self.time_token = nn.Identity() if time_width == width else nn.Linear(time_width, width)

    def forward(self, latents: Tensor, times: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Latents fp32 [B, N, C] of a grid, noised to their times fp32 [B] -> embeddings [B, 1 + N, width], the time's
        first, and embedded times [B, time_width]."""
        x = unpatchify(latents.to(self.seen.weight.dtype), grid, PATCH)
        seen, drawn = (layer(x).flatten(2).transpose(1, 2) for layer in (self.seen, self.drawn))
        both = torch.cat([see(self.blocks, seen + places(self.position.weight, grid)), drawn], dim=-1)
        embedded = self.time(time_waves(1 - times).to(x.dtype))
        return torch.cat([self.time_token(embedded)[:, None], self.fusion(both)], dim=1), embedded


class Showo2Transformer(FlowTransformer):
    """The language model and the head behind it. What embeds latents is a part of its own, which is not trained."""

    def __init__(self, config: TransformerConfig, head: FlowHeadConfig, vision: Showo2Vision) -> None:
        super().__init__(config)
        self.flow_head = FlowHead(head, config.hidden_size)
        self._vision = (vision,)  # no module of this one's

    def skeleton(self) -> Showo2Transformer:
        """See Transformer."""
        return Showo2Transformer(self.config, self.flow_head.shape, *self._vision)

    def prepare_training(self, *, compiled: bool, checkpointed: bool, backend: str = "inductor") -> None:
        """See Transformer; the head is not compiled."""
        super().prepare_training(compiled=compiled, checkpointed=checkpointed, backend=backend)
        for block in self.flow_head.blocks:
            block.is_checkpointed = checkpointed

    def prefill(self, tree: SpanTree, cache: tuple[KVCache, KVCache]) -> None:
        """See FlowTransformer."""
        of_body, of_head = cache
        self.flow_head(tree, self(tree, of_body), None, 1, of_head)

    def new_flow_cache(self, capacity: int) -> tuple[KVCache, KVCache]:
        """Of the language model and of the head."""
        return self.new_cache(capacity), self.flow_head.new_cache(capacity)

    def forward_images(
        self,
        tree: SpanTree,
        images: NoisedImages,
        cache: tuple[KVCache, KVCache] | None = None,
        embeds: Embeds | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See FlowTransformer. The head runs over the whole pass."""
        of_body, of_head = cache or (None, None)
        (vision,), repeats = self._vision, len(images.rows) // len(images.latents)
        values, times = vision(images.latents, images.times.expand(len(images.latents)), images.grid)
        own = torch.cat([images.rows[:, :1] - 1, images.rows], dim=1)
        given = joined_embeds((own.flatten(), values.repeat(repeats, 1, 1).flatten(0, 1)), embeds)
        hidden = self(tree, of_body, given)
        length, times = own.shape[1], times.repeat(repeats, 1).to(hidden.dtype)
        drawn = self.flow_head(tree, hidden, times, length, of_head)[:, 1:]
        return -_of_patches(drawn, images.grid), hidden[rows if rows is not None else slice(0, 0)]


def _of_patches(drawn: Tensor, grid: tuple[int, int]) -> Tensor:
    """What the head gives, [S, N, C]: a row has four latents of the image's raster; -> a row has those of its patch."""
    rows, columns = grid[0] * PATCH, grid[1] * PATCH
    raster = drawn.reshape(len(drawn), rows, columns, -1)
    return patchify(raster.permute(0, 3, 1, 2), PATCH)


class Showo2Model(LatentModel):
    """A model of Show-o2's class."""

    autoencoder_file = AUTOENCODER_FILE
    kept = ("config.json", SIGLIP_FILE)
    language_model: Path
    """Folder of the language model's configuration and tokenizer."""
    autoencoder: str | None
    """Folder or hub id of the autoencoder's file; None: beside the checkpoint, else AUTOENCODER."""

    @property
    def vision(self) -> Showo2Vision:
        """What it sees through, and draws by."""
        return self.parts["vision"]

    @property
    def num_features(self) -> int:
        """F: an image's time, and its latents."""
        return 1 + self.layout.num_image_tokens

    def view_pixels(self, images: np.ndarray) -> Tensor:
        """Features [n, F, D] of images that fit: their embeddings without noise."""
        return self.view_codes(self.encode_images(images))

    @torch.no_grad()
    def view_codes(self, codes: Tensor) -> Tensor:
        """Likewise of packed latents int64 [n, M]."""
        weight, grid = self.vision.fusion[3].weight, self.layout.image_grid
        latents = unpack_latents(codes.to(weight.device), self.layout.latent_size)
        found = [weight.new_zeros(0, self.num_features, len(weight))]
        for batch in latents.split(_IMAGES_PER_PASS) if len(latents) else ():
            found.append(self.vision(batch, batch.new_zeros(len(batch)), grid)[0])
        return torch.cat(found)

    def write(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Writes the published layout, with the language model's files and the autoencoder."""
        save_tensors(self.published_tensors(), folder / WEIGHTS_FILE, dtype)
        self.write_kept(folder)
        make_folder(folder / LLM_FOLDER)
        for name in LLM_FILES:
            if (self.language_model / name).is_file():
                shutil.copyfile(self.language_model / name, folder / LLM_FOLDER / name)
        shutil.copyfile(find_autoencoder(self.folder, self.autoencoder), folder / AUTOENCODER_FILE)

    def modules(self) -> tuple[nn.Module, ...]:
        """With what it sees through."""
        return *super().modules(), self.vision


class Showo2Family:
    """Opens checkpoints of Show-o2's class."""

    files = ("config.json", *WEIGHT_FILES, "*-of-*.safetensors", "*-of-*.bin")

    def claims(self, config: Any) -> bool:
        """By its class."""
        return isinstance(config, dict) and config.get("_class_name") == CLASS_NAME

    def load(
        self,
        folder: Path,
        config: Mapping[str, Any],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        vq_tokenizer: str | None = None,
    ) -> Showo2Model:
        """Opens a checkpoint; see Family.load. vq_tokenizer is load_model's: it holds Wan2.1_VAE.pth."""
        path = folder / "config.json"
        _check_config(path, config)
        language_model = find_language_model(folder, config["llm_model_path"], "Qwen/Qwen2.5-1.5B-Instruct")
        tokenizer, llm_path = FileTokenizer(language_model), language_model / "config.json"
        given = read_json(llm_path)
        with loading.errors_of(llm_path):
            given = {"tie_word_embeddings": False, **given} if isinstance(given, Mapping) else given
            shape = loading.transformer_config(given, "qwen2", _SETTINGS, {}, config["llm_vocab_size"], "Show-o2")
        layout = make_layout(tokenizer, shape.vocab_size, (config["image_latent_height"], config["image_latent_width"]))
        parts = on_meta(lambda: _parts(folder, config, shape), path)
        load_parts(parts, folder, published_tensors, "", dtype, device)
        parts["vision"].requires_grad_(False)

        def open_tokenizer(device: torch.device) -> WanAutoencoder:
            return load_autoencoder(find_autoencoder(folder, vq_tokenizer), device)

        size = layout.image_grid[0] * PATCH * WanAutoencoderConfig().downsampling
        model = Showo2Model(
            folder, parts, published_tensors, tokenizer, layout, size, PROMPTS, SAMPLING, open_tokenizer
        )
        model.language_model, model.autoencoder = language_model, vq_tokenizer
        model.flow_shift = math.exp(0.5 + 0.65 * (1 + layout.num_image_tokens - 256) / 3840)
        return model


FAMILY = Showo2Family()


def make_layout(tokenizer: FileTokenizer, vocab_size: int, grid: tuple[int, int]) -> Showo2Layout:
    """Special tokens by name. Raises: InputError if one is missing, or the vocabulary is smaller than the
    tokenizer's."""
    ids = {name: tokenizer.id(token) for name, token in TOKENS.items()}
    if max(tokenizer.vocabulary.values()) >= vocab_size:
        raise InputError(
            f"{tokenizer.folder}: has {max(tokenizer.vocabulary.values()) + 1} ids, the checkpoint's llm_vocab_size is "
            f"{vocab_size}; give the tokenizer that belongs to the checkpoint"
        )
    start, line = ids["bos"], tokenizer.encode("\n")
    before_seen = [
        start,
        *tokenizer.encode(SYSTEM),
        ids["eot"],
        *line,
        start,
        *tokenizer.encode(USER),
        ids["boi"],
        ids["pad"],
    ]
    before_answer = [*line, start, *tokenizer.encode(ASSISTANT)]
    return Showo2Layout(
        vocab_size=vocab_size, image_grid=grid, before_seen=tuple(before_seen), before_answer=tuple(before_answer),
        **ids,
    )  # fmt: skip


def published_tensors(parts: nn.ModuleDict) -> dict[str, Tensor]:
    """Of the parts: the name of each published tensor -> the parameter, or the rows of one, that it is."""
    transformer = parts["transformer"]
    found = loading.published_tensors(WEIGHTS, transformer)
    if transformer.config.tie_embeddings:
        found[f"{WEIGHTS['head'][0]}.weight"] = transformer.embed.weight.detach()
    found |= loading.published_tensors(HEAD_WEIGHTS, transformer.flow_head)
    return found | loading.published_tensors(VISION_WEIGHTS, parts["vision"])


def find_autoencoder(folder: Path, source: str | None) -> Path:
    """Its file. Raises: InputError if it is not there."""
    if source is None and (folder / AUTOENCODER_FILE).is_file():
        return folder / AUTOENCODER_FILE
    found = find_folder(source or AUTOENCODER, (AUTOENCODER_FILE,), "autoencoder", AUTOENCODER) / AUTOENCODER_FILE
    if not found.is_file():
        raise InputError(f"{found}: is not there; put the autoencoder of {AUTOENCODER} there")
    return found


def load_autoencoder(path: Path, device: torch.device | str | None = None) -> WanAutoencoder:
    """Wan2.1's, in fp32. Raises: InputError if the file does not hold its weights."""
    parts = on_meta(lambda: {"autoencoder": WanAutoencoder(_autoencoder_config(path))}, path)
    load_parts(parts, path, lambda parts: own_tensors(parts["autoencoder"]), UNUSED, torch.float32, device)
    return parts["autoencoder"].requires_grad_(False)


def _autoencoder_config(path: Path) -> WanAutoencoderConfig:
    """By the shapes of its tensors, since no file names its sizes."""
    try:
        shapes = {name: tensor.shape for name, tensor in read_tensors(path).items()}
        channels, names, number = shapes["encoder.conv1.weight"][0], "encoder.downsamples.{}", 0
        widths, counts = [], [0]
        while any(name.startswith(f"{names.format(number)}.") for name in shapes):
            block = shapes.get(f"{names.format(number)}.residual.6.weight")
            if block is None:
                counts.append(0)
            else:
                widths[len(counts) - 1 :], counts[-1] = [block[0]], counts[-1] + 1
            number += 1
        return WanAutoencoderConfig(
            channels=channels,
            channel_multipliers=tuple(width // channels for width in widths),
            num_res_blocks=counts[0],
        )
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"{path}: holds no autoencoder of Wan2.1's kind ({error}); give the model's own") from error


def _parts(folder: Path, config: Mapping[str, Any], shape: TransformerConfig) -> dict[str, nn.Module]:
    """Modules of the sizes that the weights have, since no file names the head's."""
    sizes = {name: tuple(tensor.shape) for name, tensor in read_tensors(folder).items()}
    first, head_dim = "diffusion_head_a.0", sizes["diffusion_head_a.0.self_attn.q_norm.weight"][0]
    head = FlowHeadConfig(
        hidden_size=sizes["time_embed.mlp.0.weight"][0],
        num_layers=_count(sizes, "diffusion_head_a.{}.input_layernorm.weight"),
        num_heads=sizes[f"{first}.self_attn.q_proj.weight"][0] // head_dim,
        num_kv_heads=sizes[f"{first}.self_attn.k_proj.weight"][0] // head_dim,
        mlp_size=sizes[f"{first}.mlp.gate_proj.weight"][0],
        size=Showo2Layout.latent_size,
    )
    num_places, width = sizes["position_embedding.weight"]
    num_heads = _siglip_heads(folder, config, width)
    siglip = TransformerConfig(
        vocab_size=1, hidden_size=width, num_layers=_count(sizes, "und_trans.layers.{}.layer_norm1.weight"),
        num_heads=num_heads, num_kv_heads=num_heads, mlp_size=sizes["und_trans.layers.0.mlp.fc1.weight"][0],
        norm_eps=1e-6, activation="gelu_tanh", rotary_fraction=0.0,
    )  # fmt: skip
    vision = Showo2Vision(siglip, num_places, shape.hidden_size, head.hidden_size)
    return {"transformer": Showo2Transformer(shape, head, vision), "vision": vision}


def _count(sizes: Mapping[str, tuple[int, ...]], name: str) -> int:
    return next(number for number in range(len(sizes)) if name.format(number) not in sizes)


def _siglip_heads(folder: Path, config: Mapping[str, Any], width: int) -> int:
    """By siglip/config.json, or of the published one. Raises: InputError if neither says."""
    path, name = folder / SIGLIP_FILE, config.get("clip_pretrained_model_path")
    if path.is_file():
        given = read_json(path)
        given = given.get("vision_config", given) if isinstance(given, Mapping) else {}
        heads = given.get("num_attention_heads") if isinstance(given, Mapping) else None
        if type(heads) is not int or heads < 1 or width % heads:
            raise InputError(f"{path}: num_attention_heads is {shown(heads)} at a width of {width}; restore it")
        return heads
    known_width, heads = _SIGLIP_SHAPES.get(str(name), (0, 0))
    if known_width != width:
        raise InputError(
            f"{path}: is not there, and the heads of a SigLIP of width {width} are not known; put {name}'s there"
        )
    return heads


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    for name in ("llm_vocab_size", "image_latent_height", "image_latent_width"):
        value = config.get(name)
        if type(value) is not int or not 1 <= value <= 2**24:
            raise InputError(f"{path}: {name}: expected a number from 1, got {shown(value)}; restore it")
    if not isinstance(config.get("llm_model_path"), str):
        raise InputError(
            f"{path}: llm_model_path: expected a text, got {shown(config.get('llm_model_path'))}; restore it"
        )
    for name, value in _SUPPORTED.items():
        if config.get(name, value) != value:
            raise InputError(
                f"{path}: {name} {shown(config[name])} is not supported, {value} is; use another checkpoint"
            )
