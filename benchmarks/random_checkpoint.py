"""Checkpoints of random weights in the layouts of Show-o, Janus and MMaDA, and what it takes to open and use one.

    python -m hermesflow.benchmarks.random_checkpoint make FOLDER --shape showo-1.3b --weights sharded-bin
    python -m hermesflow.benchmarks.random_checkpoint make FOLDER --shape janus-pro-1b
    python -m hermesflow.benchmarks.random_checkpoint use FOLDER

The text tokenizer spells bytes; its other entries are there for the size of the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import JanusConfig, JanusForConditionalGeneration, PreTrainedTokenizerFast

from hermesflow import load_model
from hermesflow.engine.image_tokenizers.magvit import VQTokenizer, VQTokenizerConfig
from hermesflow.engine.transformer import Transformer
from hermesflow.engine.weights import save_tensors
from hermesflow.models import janus, llada, loading, mmada, showo
from hermesflow.models.magvit import save_vq_tokenizer
from hermesflow.runtime.files import write_json

WEIGHTS = ("safetensors", "bin", "sharded-safetensors", "sharded-bin")
NUM_SPECIAL = len(showo.SPECIAL_TOKENS)


@dataclass(frozen=True, kw_only=True)
class CheckpointShape:
    """Sizes of a checkpoint; the defaults are Show-o 1.3B at 256 pixels."""

    hidden_size: int = 2048
    num_layers: int = 24
    num_heads: int = 32
    mlp_size: int = 8192
    text_vocab_size: int = 50_295
    num_image_tokens: int = 256
    vision_size: int | None = None
    """Width of the vision encoder's features, in the variant that sees through one."""
    vq: VQTokenizerConfig = VQTokenizerConfig()


TINY = CheckpointShape(
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    mlp_size=64,
    text_vocab_size=300,
    num_image_tokens=16,
    vq=VQTokenizerConfig(
        code_bits=6, channels=8, channel_multipliers=(1, 1, 2, 2, 2), num_res_blocks=(1, 1, 1, 1, 1), num_groups=4
    ),
)
SHAPES = {"showo-1.3b": CheckpointShape(), "tiny": TINY}


@dataclass(frozen=True, kw_only=True)
class JanusShape:
    """Sizes of a checkpoint of Janus; those with defaults are the same in all that are published."""

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    vision_size: int = 1024
    num_vision_layers: int = 24
    code_channels: int = 128
    """Of the image tokenizer's first level."""
    side: int = 24
    """Rows, and columns, of an image's codes and of its features."""


JANUS_SHAPES = {
    "tiny-janus": JanusShape(
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        mlp_size=48,
        vision_size=32,
        num_vision_layers=2,
        code_channels=32,
        side=3,
    ),
    "janus-pro-1b": JanusShape(hidden_size=2048, num_layers=24, num_heads=16, mlp_size=5632),
    "janus-pro-7b": JanusShape(hidden_size=4096, num_layers=30, num_heads=32, mlp_size=11_008),
}


def write_janus(folder: Path, shape: JanusShape, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
    """Writes FOLDER in the layout of transformers' Janus, in shards of at most 2 GB or a tensor.

    Args:
        folder: where to; made if need be.
        shape: the sizes.
        dtype: of the weights.
        seed: of the weights.
    """
    width, heads = shape.hidden_size, max(2, shape.vision_size // 64)
    config = JanusConfig(
        text_config={
            "model_type": "llama", "hidden_size": width, "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads, "num_key_value_heads": shape.num_heads,
            "intermediate_size": shape.mlp_size, "vocab_size": 102_400, "rms_norm_eps": 1e-6,
        },
        vision_config={
            "hidden_size": shape.vision_size, "num_hidden_layers": shape.num_vision_layers,
            "num_attention_heads": heads, "patch_size": 16, "image_size": 16 * shape.side,
            "num_image_tokens": shape.side**2, "projection_dim": width, "depth": 2, "mlp_ratio": 4.0,
        },
        vq_config={
            "base_channels": shape.code_channels, "num_patches": shape.side, "image_token_embed_dim": width,
            "projection_dim": width,
        },
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, 101_000, tuple(janus.TOKENS.values()))
    write_json(folder / "config.json", config.to_dict() | {"architectures": ["JanusForConditionalGeneration"]})
    write_json(folder / "preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in JanusForConditionalGeneration(config).state_dict().items()}
    _write_shards(folder, shapes, dtype, seed)


@dataclass(frozen=True, kw_only=True)
class MMaDAShape:
    """Sizes of a checkpoint of MMaDA; the defaults are those of 8B."""

    hidden_size: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    mlp_size: int = 12_288
    num_image_tokens: int = 1024
    vq: VQTokenizerConfig = VQTokenizerConfig()


MMADA_SHAPES = {
    "mmada-8b": MMaDAShape(),
    "tiny-mmada": MMaDAShape(hidden_size=32, num_layers=2, num_heads=2, mlp_size=48, num_image_tokens=16, vq=TINY.vq),
}


def write_mmada(folder: Path, shape: MMaDAShape, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
    """Writes FOLDER in MMaDA's layout, with magvitv2/; arguments are those of write_janus."""
    text, codes = 126_349, shape.vq.codebook_size
    vocab_size = 134_656 if codes == VQTokenizerConfig().codebook_size else text + codes
    config = {
        "model_type": "mmada", "architectures": ["MMadaModelLM"], "d_model": shape.hidden_size,
        "n_layers": shape.num_layers, "n_heads": shape.num_heads, "n_kv_heads": shape.num_heads,
        "mlp_hidden_size": shape.mlp_size, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
        "embedding_size": vocab_size, "vocab_size": vocab_size, "codebook_size": codes,
        "num_vq_tokens": shape.num_image_tokens,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, text, tuple(mmada.TOKENS.values()))
    write_json(folder / "config.json", config)
    with torch.device("meta"):
        transformer = Transformer(llada.transformer_config(config, "mmada", "MMaDA"))
    tensors = loading.published_tensors(llada.WEIGHTS, transformer)
    _write_shards(folder, {name: tensor.shape for name, tensor in tensors.items()}, dtype, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vq_tokenizer = VQTokenizer(shape.vq)
    (folder / "magvitv2").mkdir(exist_ok=True)
    save_vq_tokenizer(vq_tokenizer, folder / "magvitv2")


def _write_shards(folder: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype, seed: int) -> None:
    """Random tensors of these shapes, never more than a shard in memory."""
    generator, weight_map, shard = torch.Generator().manual_seed(seed), {}, {}
    left = sum(shape.numel() for shape in shapes.values())
    for name, of in shapes.items():
        shard[name] = torch.empty(of, dtype=dtype)
        _fill(name, shard[name], generator)
        left -= of.numel()
        if not left or sum(tensor.nbytes for tensor in shard.values()) > 2 << 30:
            file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_tensors(shard, folder / file)
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def write_checkpoint(
    folder: Path,
    shape: CheckpointShape,
    *,
    weights: str = "safetensors",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    num_shards: int = 3,
) -> None:
    """Writes FOLDER with config.json, weights, llm/ and magvitv2/.

    Args:
        folder: where to; made if need be.
        shape: the sizes.
        weights: one of WEIGHTS.
        dtype: of the backbone; the image tokenizer is fp32.
        seed: of the weights.
        num_shards: of the sharded kinds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    codes = shape.vq.codebook_size
    vocab_size = shape.text_vocab_size + NUM_SPECIAL + codes + 1
    write_tokenizer(folder / "llm", shape.text_vocab_size)
    llm = language_model_config(shape)
    write_json(folder / "llm" / "config.json", llm)
    write_json(
        folder / "config.json",
        {
            "_class_name": "Showo",
            "vocab_size": vocab_size,
            "llm_vocab_size": shape.text_vocab_size,
            "codebook_size": codes,
            "num_vq_tokens": shape.num_image_tokens,
            "llm_model_path": "llm",
            "w_clip_vit": shape.vision_size is not None,
            "mask_token_id": vocab_size - 1,
            "load_from_showo": True,
        },
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        transformer = Transformer(showo.transformer_config(llm, vocab_size)).to(dtype)
    tensors = showo.published_tensors(transformer.to_empty(device="cpu"))
    if shape.vision_size is not None:
        size = shape.hidden_size
        shapes = ((size, shape.vision_size), (size,), (size, size), (size,))
        tensors |= {name: torch.empty(of, dtype=dtype) for name, of in zip(showo.PROJECTOR, shapes, strict=True)}
    for name, tensor in tensors.items():
        _fill(name, tensor, generator)
    _write_weights(folder, tensors, weights, num_shards)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vq_tokenizer = VQTokenizer(shape.vq)
    (folder / "magvitv2").mkdir(exist_ok=True)
    save_vq_tokenizer(vq_tokenizer, folder / "magvitv2")


def language_model_config(shape: CheckpointShape) -> dict[str, Any]:
    """The configuration of the language model that a backbone of this shape grows from, as transformers has it."""
    return {
        "model_type": "phi",
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_heads,
        "intermediate_size": shape.mlp_size,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "vocab_size": shape.text_vocab_size,
    }


def write_tokenizer(folder: Path, size: int, special: Sequence[str] = ("<|endoftext|>",)) -> None:
    """Writes a tokenizer of that many ids that spells text byte by byte. Special tokens come first; the very first one
    begins and ends texts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    unused = (f"<unused {index}>" for index in range(size - len(alphabet) - len(special)))
    names = [*special, *alphabet, *unused]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[0], unk_token=special[0]
    )
    wrapped.add_special_tokens({"additional_special_tokens": list(special[1:])})
    wrapped.save_pretrained(str(folder))


def _fill(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Weights of such a size that hidden states keep theirs; norms near 1 and biases near 0."""
    if tensor.dim() == 2:
        tensor.normal_(0, tensor.shape[1] ** -0.5, generator=generator)
    else:
        tensor.normal_(float("norm" in name and name.endswith("weight")), 0.02, generator=generator)


def _write_weights(folder: Path, tensors: dict[str, Tensor], weights: str, num_shards: int) -> None:
    kind = weights.removeprefix("sharded-")
    if not weights.startswith("sharded-"):
        _write_file(folder / f"pytorch_model.{kind}", tensors)
        return
    weight_map = {}
    for number, names in enumerate(_shards(tensors, num_shards), start=1):
        file = f"pytorch_model-{number:05d}-of-{num_shards:05d}.{kind}"
        _write_file(folder / file, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map}
    write_json(folder / f"diffusion_pytorch_model.{kind}.index.json", index)


def _shards(tensors: dict[str, Tensor], num_shards: int) -> Iterator[list[str]]:
    """Names in order, cut into parts of about equal bytes."""
    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0
    parts: list[list[str]] = [[] for _ in range(num_shards)]
    for name, tensor in tensors.items():
        parts[min(done * num_shards // total, num_shards - 1)].append(name)
        done += tensor.nbytes
    return iter(parts)


def _write_file(path: Path, tensors: dict[str, Tensor]) -> None:
    if path.suffix == ".bin":
        torch.save({name: tensor.clone() for name, tensor in tensors.items()}, path)
    else:
        save_tensors(tensors, path)


def use_checkpoint(
    folder: Path, num_steps: int, max_new_tokens: int, text_steps: int = 0
) -> dict[str, float | int | str]:
    """Opens a checkpoint, draws an image and captions it; one line of seconds and peak memory."""
    from hermesflow.engine.decoders.text import SamplingParams

    checkpoint_bytes = sum(path.stat().st_size for path in folder.glob("*model*"))
    before, began = _peak_mib(), time.perf_counter()
    model = load_model(str(folder))
    opened, opened_mib = time.perf_counter(), _peak_mib()
    sampling = model.sampling
    if "num_steps" in (item.name for item in fields(sampling)):
        sampling = replace(sampling, num_steps=num_steps)
    seeds = torch.zeros(1, 1, dtype=torch.int64)
    prompt = model.image_prompt("a red circle above a blue square")
    codes = model.engine.generate([prompt], num_images=1, seeds=seeds, sampling=sampling)[0]
    image = model.decode_images(codes)
    drawn = time.perf_counter()
    greedy = [SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens, num_steps=text_steps)]
    seeds = torch.zeros(1, 1, 1, dtype=torch.int64)
    seen, question = model.view_images([Image.fromarray(image[0])]), model.caption_prompt()
    (((ids,),),) = model.engine.generate_text(seen, [[question]], sampling=greedy, seeds=seeds)
    captioned = time.perf_counter()
    return {
        "checkpoint_mib": round(checkpoint_bytes / 2**20),
        "before_mib": before,
        "load_peak_mib": opened_mib,
        "load_peak_to_checkpoint": round(opened_mib * 2**20 / checkpoint_bytes, 3),
        "load_s": round(opened - began, 2),
        "image_px": image.shape[1],
        "image_tokens": codes.shape[1],
        "num_steps": getattr(sampling, "num_steps", codes.shape[1]),
        "image_s": round(drawn - opened, 2),
        "caption_tokens": len(ids),
        "caption_s": round(captioned - drawn, 2),
        "peak_mib": _peak_mib(),
        "dtype": str(model.engine.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def _peak_mib() -> int:
    """Largest resident memory of this process so far, mapped files included (getrusage would count its parent's)."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024


def _make(arguments: argparse.Namespace) -> None:
    folder, name, dtype = arguments.folder, arguments.shape, getattr(torch, arguments.dtype)
    if name in JANUS_SHAPES:
        write_janus(folder, JANUS_SHAPES[name], dtype=dtype)
    elif name in MMADA_SHAPES:
        write_mmada(folder, MMADA_SHAPES[name], dtype=dtype)
    else:
        write_checkpoint(folder, SHAPES[name], weights=arguments.weights, dtype=dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("make", help="write a checkpoint")
    make.add_argument("folder", type=Path)
    make.add_argument("--shape", choices=(*SHAPES, *JANUS_SHAPES, *MMADA_SHAPES), default="showo-1.3b")
    make.add_argument("--weights", choices=WEIGHTS, default="safetensors", help="of Show-o's")
    make.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    make.set_defaults(run=_make)
    use = commands.add_parser("use", help="open it, draw an image and caption it; prints a JSON line")
    use.add_argument("folder", type=Path)
    use.add_argument("--num-steps", type=int, default=18)
    use.add_argument("--max-new-tokens", type=int, default=20)
    use.add_argument("--text-steps", type=int, default=0, help="of masked text; 0: as the decoder has them")
    use.set_defaults(
        run=lambda a: print(json.dumps(use_checkpoint(a.folder, a.num_steps, a.max_new_tokens, a.text_steps)))
    )
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
