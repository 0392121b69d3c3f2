"""How the built-in tiny model is made from a seed: first its image tokenizer, then its transformer.

The transformer trains in Show-o's way (arXiv 2408.12528): masked image tokens under a cosine schedule given the
caption, or the next code (pretrain.images causal), or the velocity of noised latents (flow, as Transfusion, arXiv
2408.11039), and next-token prediction of captions and answers given the image.
Every batch is one forest of span trees: a caption carries two differently masked copies of its image, or the image
itself, an image carries its caption and several questions. A step's batch is a pure function of (seed, step), so that a
killed run resumes from its checkpoint with the same result.

A step has two half-batches. One process works on both in turn; under torchrun two processes take one each and average
their gradients, which on two cores is faster than one process with two threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hermesflow.config import PretrainConfig
from hermesflow.engine.decoders.autoregressive import CodeSamplingParams
from hermesflow.engine.decoders.flow import FlowSamplingParams
from hermesflow.engine.decoders.masked import ImageSamplingParams
from hermesflow.engine.image_tokenizers.magvit import VQTokenizer, VQTokenizerConfig
from hermesflow.engine.latents import LatentConfig, LatentTransformer, unpack_latents
from hermesflow.engine.token_layout import Layout, TokenLayout
from hermesflow.engine.transformer import Transformer, TransformerConfig
from hermesflow.engine.weights import load_weights, save_weights
from hermesflow.kernels.linear_logprob import linear_logprob
from hermesflow.kernels.span_tree import Span, SpanTree
from hermesflow.models.model import Model, PromptFormat
from hermesflow.models.text_tokenizers import WordTokenizer
from hermesflow.models.tiny import FlowLayout, TinyFlowModel, TinyModel
from hermesflow.runtime.checkpointing import load_checkpoint, save_checkpoint
from hermesflow.runtime.distributed import barrier, is_main, on_main, rank, sum_over_ranks, world_size
from hermesflow.runtime.files import (
    InputError,
    atomic_folder,
    atomic_write,
    make_folder,
    read_json,
    write_json,
)
from hermesflow.runtime.metric_log import MetricLog
from hermesflow.runtime.progress import track
from hermesflow.worlds import shapes

IMAGE_SIZE = 64
TOKENIZER = VQTokenizerConfig(
    code_bits=10, channels=48, channel_multipliers=(1, 2, 2), num_res_blocks=(1, 1, 1), num_groups=8, patch_size=4
)
NUM_IMAGE_TOKENS = (IMAGE_SIZE // TOKENIZER.downsampling) ** 2
PROMPTS = PromptFormat(caption_question=shapes.CAPTION_QUESTION)
SAMPLING = ImageSamplingParams(num_steps=8, guidance_scale=0.5, mask_temperature=1.0, temperature=0.7)
CODE_SAMPLING = CodeSamplingParams(guidance_scale=0.5, temperature=0.7)
FLOW_SAMPLING = FlowSamplingParams(num_steps=17, guidance_scale=1.0)
OBJECT_WEIGHT = 10.0
"""Weight of pixels on or within 3 px of an object: backgrounds are easy and large."""
QUESTIONS_PER_IMAGE = 6
MASKS_PER_IMAGE, NOISES_PER_IMAGE = 2, 4
HALF_BATCHES = 2


def run_pretraining(config: PretrainConfig) -> Path:
    """Makes the tiny model, resuming an earlier run in the same folder.

    Args:
        config: sizes, steps, rates and seed; config.folder receives checkpoints, metrics of both stages and the model.
    Returns: the folder of the finished model, for load_model.
    Raises: InputError if the folder cannot be written or a checkpoint in it is damaged.
    """
    folder = make_folder(config.folder)
    if HALF_BATCHES % world_size():
        raise InputError(f"pretraining: a step has {HALF_BATCHES} half-batches; start 1 or {HALF_BATCHES} processes")
    on_main(lambda: check_settings(config, folder / "settings.json"))
    text_tokenizer = WordTokenizer.of_words(shapes.vocabulary())
    kind, sampling = {
        "masked": (TinyModel, SAMPLING), "causal": (TinyModel, CODE_SAMPLING), "flow": (TinyFlowModel, FLOW_SAMPLING)
    }[config.images]  # fmt: skip
    layout = make_layout(config, text_tokenizer)
    shape = TransformerConfig(
        vocab_size=layout.vocab_size,
        hidden_size=128,
        num_layers=6,
        num_heads=4,
        num_kv_heads=4,
        mlp_size=512,
        activation="relu2",
        qk_norm=True,
        bias=False,
    )
    latents = LatentConfig(size=TOKENIZER.code_bits, side=layout.image_grid[0])
    transformer = LatentTransformer(shape, latents) if config.images == "flow" else Transformer(shape)
    transformer.init_weights(torch.Generator().manual_seed(config.seed))
    vq_tokenizer = VQTokenizer(TOKENIZER)
    weights = folder / "vq_tokenizer.safetensors"
    if is_main() and not weights.exists():
        trained = train_tokenizer(config)
        with atomic_write(weights) as temporary:
            save_weights(trained, temporary)
    barrier()
    try:
        load_weights(vq_tokenizer, weights)
    except ValueError as error:
        raise InputError(f"{error}, or delete it and run the same command again to train it anew") from error
    model = kind(transformer, vq_tokenizer.eval(), text_tokenizer, layout, IMAGE_SIZE, PROMPTS, sampling)
    train_transformer(model, config)

    def save() -> None:
        with atomic_folder(folder / "model") as temporary:
            model.save(temporary, dtype=torch.float16)

    on_main(save)
    return folder / "model"


def make_layout(config: PretrainConfig, text_tokenizer: WordTokenizer) -> Layout:
    """The vocabulary of a model that draws as the settings say."""
    shared = {
        "text_vocab_size": text_tokenizer.size, "num_image_tokens": NUM_IMAGE_TOKENS, "sot": text_tokenizer.bos,
        "eot": text_tokenizer.eos,
    }  # fmt: skip
    if config.images == "flow":
        return FlowLayout(**shared, latent_size=TOKENIZER.code_bits)
    mode = "full" if config.images == "masked" else "causal"
    return TokenLayout(**shared, codebook_size=TOKENIZER.codebook_size, image_mode=mode)


def check_settings(config: PretrainConfig, path: Path) -> None:
    """Keeps the settings beside the checkpoints; refuses to resume under others.

    Raises: InputError that names the settings which differ.
    """
    now = {name: value for name, value in asdict(config).items() if name != "folder"}
    if not path.exists():
        write_json(path, now)
        return
    saved = read_json(path)
    saved = {"images": "masked"} | saved if isinstance(saved, dict) else {}  # files of before do not say
    changed = [f"pretrain.{name}" for name in now if now[name] != saved.get(name)]
    if changed:
        raise InputError(
            f"{path}: the folder holds a run with other settings ({', '.join(changed)}); choose another "
            f"pretrain.folder, or delete {path.parent} to start over"
        )


def train_tokenizer(config: PretrainConfig) -> VQTokenizer:
    """Trains the image tokenizer on freshly rendered scenes.

    The loss is the weighted absolute and squared error, plus LFQ's commitment and entropy terms (arXiv 2310.05737). The
    latent passes through tanh before its sign is taken, which the sign does not notice: it bounds the straight-through
    gradient's error and leaves a code with fewer, surer entries for the transformer to learn.
    """
    torch.manual_seed(config.seed)
    model = VQTokenizer(TOKENIZER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.tokenizer_lr, betas=(0.9, 0.95), weight_decay=0.01)
    log = MetricLog(Path(config.folder) / "tokenizer.jsonl", 0)
    steps = track(config.tokenizer_steps, "tokenizer", "steps")
    for step in steps:
        set_lr(optimizer, config.tokenizer_lr, step, config.tokenizer_steps, 50)
        scenes = shapes.sample_scenes("train", config.tokenizer_batch, seed=config.seed * 1_000_003 + step)
        images = to_pixels(shapes.render(scenes))
        with torch.autocast("cpu", torch.bfloat16):
            latent = torch.tanh(model.encode_latent(images).float())
            code = torch.where(latent > 0, 1.0, -1.0)
            reconstruction = model.decode_latent(latent + (code - latent).detach())
        error = reconstruction.float() - images
        fit = (object_weights(images) * (error.abs() + error.square())).mean()
        loss = fit + 0.05 * (latent - code).square().mean() - 0.02 * code_entropy(latent)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        log.add({"step": step, "fit": fit.item(), "loss": loss.item()})
        if step % 50 == 0:
            steps.note(f"fit {fit.item():.4f}")
    return model.eval()


def code_entropy(latent: Tensor) -> Tensor:
    """How evenly and surely each bit is used: entropy of the batch's mean bit less the mean entropy of a bit, in nats.

    latent: [B, code_bits, h, w] in (-1, 1). Bits are taken as independent, as LFQ's factorized entropy does.
    """
    probability = torch.sigmoid(4 * latent)
    return _binary_entropy(probability.mean(dim=(0, 2, 3))).mean() - _binary_entropy(probability).mean()


def _binary_entropy(p: Tensor) -> Tensor:
    p = p.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log())


def object_weights(images: Tensor) -> Tensor:
    """Weights [B, 1, H, W]: OBJECT_WEIGHT within 3 px of anything that is not the corner's color, else 1."""
    different = (images - images[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.1
    near = F.max_pool2d(different.float(), 7, stride=1, padding=3)
    return 1 + (OBJECT_WEIGHT - 1) * near


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 [n, H, W, 3] -> fp32 [n, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


@dataclass(frozen=True)
class Batch:
    """One step's forest with what it must predict: packed rows and joint-vocabulary targets, by task.

    Of a flow the targets of "image" are velocities, and latents are all rows that hold latents: rows int64 [R], noised
    fp32 [R, C], times fp32 [R] (0: an image that is seen), places int64 [R].
    """

    tree: SpanTree
    rows: dict[str, Tensor]
    targets: dict[str, Tensor]
    latents: tuple[Tensor, Tensor, Tensor, Tensor] | None = None


class SceneBatches:
    """Batches from a fixed set of scenes whose images were encoded once."""

    def __init__(self, model: Model, split: str, num_scenes: int, seed: int) -> None:
        self.layout, self.tokenizer = model.layout, model.text_tokenizer
        self.scenes = shapes.sample_scenes(split, num_scenes, seed=seed)
        chunks = [self.scenes[start : start + 512] for start in range(0, num_scenes, 512)]
        codes = [model.encode_images(shapes.render(chunk)) for chunk in track(chunks, f"{split} images", "batches")]
        codes = torch.cat(codes)
        self.codes = codes.numpy()
        if self.layout.latent_size:
            self.latents = unpack_latents(codes, self.layout.latent_size).numpy()

    def draw(self, rng: np.random.Generator, num_generation: int, num_understanding: int, dropout: float) -> Batch:
        """num_generation captions with masked copies of their images, num_understanding images with their texts."""
        chosen = rng.integers(len(self.scenes), size=num_generation + num_understanding)
        captions = self._encode([shapes.caption(self.scenes[index], rng) for index in chosen])
        spans: list[Span] = []
        rows: dict[str, list[np.ndarray]] = {"image": [], "caption": [], "answer": []}
        targets: dict[str, list[np.ndarray]] = {"image": [], "caption": [], "answer": []}
        packed = 0
        latents: list[tuple[np.ndarray, ...]] = []

        def add(ids: list[int], parent: int, mode: str) -> int:
            nonlocal packed
            spans.append((ids, parent, mode))
            packed += len(ids)
            return len(spans) - 1

        def learn(task: str, offsets: np.ndarray, ids: np.ndarray | list[int]) -> None:
            """The next span to be added predicts ids at these offsets of its own tokens."""
            rows[task].append(packed + offsets)
            targets[task].append(np.asarray(ids))

        def show(index: int, offsets: np.ndarray, time: float = 0.0, noise: np.ndarray | float = 0.0) -> np.ndarray:
            """The next span to be added holds an image's latents, noised to a time; returns their velocities."""
            image = self.latents[index]
            noised = (1 - time) * image + time * noise
            latents.append((packed + offsets, noised, np.full(len(offsets), time), np.arange(len(offsets))))
            return noise - image

        for index, caption in zip(chosen[:num_generation], captions, strict=False):
            root = add(self.layout.text_prompt([] if rng.random() < dropout else caption), -1, "causal")
            codes = self.codes[index]
            image = np.array(self.layout.image(codes))
            position = rng.random()
            if self.layout.latent_size:
                places = self.layout.code_positions
                for copy in range(NOISES_PER_IMAGE):
                    noise = rng.standard_normal(self.latents[index].shape)
                    time = NormalDist().inv_cdf(0.999 * ((position + copy / NOISES_PER_IMAGE) % 1) + 0.0005)
                    learn("image", places, show(index, places, 1 / (1 + math.exp(-time)), noise))
                    add(image, root, "full")
                continue
            if self.layout.image_mode == "causal":
                places = self.layout.code_positions
                learn("image", places - 1, image[places])
                add(image, root, "causal")
                continue
            for copy in range(MASKS_PER_IMAGE):
                ratio = math.cos(0.5 * math.pi * ((position + copy / MASKS_PER_IMAGE) % 1))
                masked = rng.permutation(len(codes))[: max(round(ratio * len(codes)), 1)]
                hidden = self.layout.code_positions[masked]
                learn("image", hidden, image[hidden])
                add(np.where(np.isin(np.arange(len(image)), hidden), self.layout.mask_id, image), root, "full")
        for index, caption in zip(chosen[num_generation:], captions[num_generation:], strict=True):
            if self.layout.latent_size:
                seen = self.layout.feature_span(self.layout.num_image_tokens)
                show(index, np.array(seen.rows))
                root = add(seen.ids, -1, seen.mode)
            else:
                root = add(self.layout.image_prefix(self.codes[index]), -1, self.layout.prefix_mode)
            questions = shapes.training_questions(self.scenes[index], rng, QUESTIONS_PER_IMAGE)
            asked = self._encode([shapes.CAPTION_QUESTION, *(question.question for question in questions)])
            answers = [caption, *self._encode([question.answer for question in questions])]
            for number, (question, answer) in enumerate(zip(asked, answers, strict=True)):
                prefix, target = self.layout.question(question), [*answer, self.layout.eot]
                learn("answer" if number else "caption", len(prefix) - 1 + np.arange(len(target)), target)
                add([*prefix, *answer], root, "causal")
        return Batch(
            SpanTree.build(spans),
            {task: torch.from_numpy(np.concatenate(found)) for task, found in rows.items()},
            {task: _to_tensor(found) for task, found in targets.items()},
            tuple(map(_to_tensor, zip(*latents, strict=True))) if latents else None,
        )

    def _encode(self, texts: Iterable[str]) -> list[list[int]]:
        return self.tokenizer.encode_batch(list(texts))


def _to_tensor(parts: Sequence[np.ndarray]) -> Tensor:
    """Int64 stays; other numbers become fp32."""
    values = torch.from_numpy(np.concatenate(parts))
    return values.float() if values.is_floating_point() else values


def train_transformer(model: Model, config: PretrainConfig) -> None:
    """Trains model.transformer in place on fixed scenes, with Muon on the blocks' matrices and AdamW on the rest."""
    transformer = model.transformer.train()
    matrices = [parameter for parameter in transformer.blocks.parameters() if parameter.dim() == 2]
    others = [
        parameter
        for parameter in transformer.parameters()
        if parameter.requires_grad and all(parameter is not matrix for matrix in matrices)
    ]
    optimizers = [
        torch.optim.Muon(matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay),
    ]
    folder = Path(config.folder)
    start = load_checkpoint(folder, transformer, optimizers).get("step", 0)
    if not start and (folder / "checkpoint.pt").exists():
        raise InputError(f"{folder / 'checkpoint.pt'}: was written by an older version; delete {folder} to start over")
    log = MetricLog(folder / "metrics.jsonl", start)
    if start == config.steps:
        return
    train = SceneBatches(model, "train", config.num_scenes, seed=config.seed)
    held_out = SceneBatches(model, "validation", 512, seed=config.seed)
    steps = track(range(start, config.steps), "transformer", "steps", completed=start)
    for step in steps:
        for optimizer in optimizers:
            set_lr(optimizer, config.lr, step, config.steps, config.warmup_steps)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        losses = add_gradients(transformer, train, config, step)
        norm = nn.utils.clip_grad_norm_(transformer.parameters(), 1.0).item()
        if not math.isfinite(norm):
            raise InputError(f"pretraining: the gradient's norm is {norm} at step {step}; lower pretrain.lr")
        for optimizer in optimizers:
            optimizer.step()
        metrics = {task: round(value.item(), 4) for task, value in losses.items()}
        if step % 50 == 0:
            steps.note(" ".join(f"{task} {value:.3f}" for task, value in metrics.items()))
        last = step + 1 == config.steps
        if is_main() and (last or (step + 1) % config.eval_every == 0):
            found = validate(transformer, held_out, config)
            metrics |= {f"validation/{name}": value for name, value in found.items()}
        log.add({"step": step, **metrics})
        if last or (step + 1) % config.checkpoint_every == 0:
            save_checkpoint(folder, transformer, optimizers, {"step": step + 1}, keep=1)
    transformer.eval()


def add_gradients(
    transformer: Transformer, train: SceneBatches, config: PretrainConfig, step: int
) -> dict[str, Tensor]:
    """Adds the gradient of a step's mean loss, the same however many processes share its half-batches.

    Returns: the losses of this process's last half-batch.
    """
    halves = range(rank(), HALF_BATCHES, world_size())
    for half in halves:
        rng = np.random.default_rng([config.seed, step, half])
        batch = train.draw(rng, config.batch_images, config.batch_understanding, config.condition_dropout)
        losses, _ = batch_losses(transformer, batch)
        (sum(losses.values()) / len(halves)).backward()
    average_gradients(transformer)
    return losses


def average_gradients(module: nn.Module) -> None:
    """Replaces every gradient by its mean over the processes."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in module.parameters() if parameter.requires_grad]
    flat = sum_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, mean in zip(gradients, flat.split([item.numel() for item in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient) / world_size())


def batch_losses(transformer: Transformer, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """Mean negative log-likelihood of each task over the joint vocabulary, or of velocities their mean square error,
    and the hidden states [T, D]."""
    with torch.autocast("cpu", torch.bfloat16):
        embeds = None
        if batch.latents is not None:
            rows, *latents = batch.latents
            embeds = rows, transformer.latent_embeds(*latents)
        hidden = transformer(batch.tree, embeds=embeds).float()
    head, losses = transformer.head, {}
    for task, rows in batch.rows.items():
        targets = batch.targets[task]
        if targets.is_floating_point():
            losses[task] = F.mse_loss(transformer.velocities(hidden[rows]), targets)
        else:
            losses[task] = -linear_logprob(hidden[rows], head.weight, targets, bias=head.bias).mean()
    return losses, hidden


@torch.no_grad()
def validate(transformer: Transformer, batches: SceneBatches, config: PretrainConfig) -> dict[str, float]:
    """Losses on held-out scenes, and how often the most likely token of each task is right."""
    transformer.eval()
    batch = batches.draw(np.random.default_rng(config.seed), 256, 256, dropout=0.0)
    losses, hidden = batch_losses(transformer, batch)
    result = {task: round(value.item(), 4) for task, value in losses.items()}
    for task, rows in batch.rows.items():
        if batch.targets[task].is_floating_point():
            continue
        best = transformer.head(hidden[rows]).argmax(-1)
        result[f"{task}_accuracy"] = round((best == batch.targets[task]).float().mean().item(), 4)
    transformer.train()
    return result


def set_lr(optimizer: torch.optim.Optimizer, peak: float, step: int, num_steps: int, warmup: int) -> None:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    progress = max(step - warmup, 0) / max(num_steps - warmup, 1)
    factor = min((step + 1) / max(warmup, 1), 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
    for group in optimizer.param_groups:
        group["lr"] = peak * factor * group.get("lr_scale", 1.0)
