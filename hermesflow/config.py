"""Settings of a run: one frozen dataclass a concern, read from a TOML file and `--set section.key=value`.

A round may have settings of its own: a table [round.2.train], or round.2.train.lr=1e-5.

Every value is checked when its section is made; an unknown key is refused with the nearest name. `to_toml` writes the
resolved settings, with the meaning of each key, as they are kept beside a run.
"""

import ast
import contextlib
import difflib
import functools
import inspect
import json
import math
import os
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hermesflow.kernels import LOSS_TYPES
from hermesflow.runtime.files import InputError, check_unicode, expand_home, read_bytes
from hermesflow.runtime.registry import (
    ALGORITHMS,
    ANSWER_SCORERS,
    CAPTION_SCORERS,
    EVALUATIONS,
    FAMILIES,
    IMAGE_SCORERS,
    LOSSES,
    REWARDS,
    SOURCES,
)

PAPER_OBJECTIVE = {
    "understanding_weight": 1.0, "nll_weight": 0.0, "replay_weight": 0.0, "masks_per_pair": 1,
    "complementary_masks": False,
}  # fmt: skip
"""Training settings under which a step computes the objective of HermesFlow (arXiv 2502.12148), section 4, alone."""
STUDY_ARMS = (
    "pair-dpo", "grpo", "no-op", "random-pairs", "sft-best", "distill", "best-of-4", "generation-only",
    "understanding-only", "oracle-pairs", "positive-control", "own-drawings",
    "grpo+own-drawings", "pair-dpo+grpo", "merged",
)  # fmt: skip


DRAWING = ("num_steps", "temperature", "guidance_scale", "mask_temperature", "top_k", "top_p")
"""The settings that say how images are drawn."""


class ConfigError(ValueError):
    """A value that a section refuses; `key` is the field's name, `reason` what was expected and what was got."""

    def __init__(self, section: str, key: str, reason: str) -> None:
        super().__init__(f"{section}.{key}: {reason}")
        self.key = key
        self.reason = reason


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where a run lives, and the seed of all its random draws."""

    name: str = "selfplay"
    """Name of the run's folder; the same name resumes the same run."""
    folder: str = "runs"
    """Folder that holds the runs."""
    seed: int = 0
    """Seed of data, candidates and training."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_seed(self)
        if self.name in ("", ".", "..") or not self.name.isprintable() or "/" in self.name or "\\" in self.name:
            raise ConfigError("RunConfig", "name", f"expected a plain folder name, got {self.name!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The unified model that is improved."""

    name: str = "tiny"
    """"tiny" (masked codes), "tiny-ar" (code by code) or "tiny-flow" (latents by a flow), which ship with the package;
    the folder of a model; or a hub id."""
    device: str = "auto"
    """Where it runs: cpu, cuda or cuda:N; auto takes cuda where there is one."""
    judge: str = ""
    """A second model, by folder or hub id, that scores the drawn images of pairs, such as Emu3-Chat for Emu3-Gen; needs
    the same image codes. Empty: the model scores its own."""
    family: str = "auto"
    """Its family, by name or "module:object" of your own; auto finds it by config.json."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights that draw and judge; auto keeps the checkpoint's. Training is in float32."""
    image_size: int = 0
    """Side in pixels of drawn images and of records, in families that take any size (emu3, lumina-dimoo); 0 is the
    published size."""
    answer_masks: int = 0
    """Masks by which the likelihood of an answer is estimated, in families that fill masks (mmada, lumina-dimoo); 0
    hides all of an answer once, which is exact for answers of one token."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_at_least(self, 0, "image_size", "answer_masks")
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", self.device):
            raise ConfigError("ModelConfig", "device", f"expected auto, cpu, cuda or cuda:N, got {self.device!r}")
        _check_name(self, "family", ("auto", *FAMILIES))


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The image-caption pairs."""

    source: str = "shapes"
    """"shapes" for the built-in world, or a file of records: JSON, JSON lines, Parquet or a tar; a folder or pattern of
    such files, here or at an address that fsspec opens; or the hub's id of a data set."""
    questions: str = ""
    """A file of questions that are joined to the records by id, such as the published vqa_data.json."""
    root: str = ""
    """Folder that image paths start from and may not leave; empty is the folder of the source."""
    num_records: int = 512
    """Training prompts in each round."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_at_least(self, 1, "num_records")
        for name in ("questions", "root"):
            if getattr(self, name) and self.source in SOURCES:
                raise ConfigError("DataConfig", name, f'expected a file of records in data.source, got "{self.source}"')


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawingConfig:
    """How images are drawn; curation and eval take what they leave open from here."""

    num_steps: int = 0
    """Decoding steps of an image; 0 leaves the number open, at last to the model."""
    temperature: float = -1.0
    """Sampling temperature of image tokens, 0 for the most likely ones; -1 leaves it open."""
    guidance_scale: float = -1.0
    """Classifier-free guidance g in (1 + g) * conditional - g * unconditional; -1 leaves it open."""
    mask_temperature: float = -1.0
    """Noise on the confidence that decides which image tokens are masked again; -1 leaves it open."""
    top_k: int = -1
    """Image tokens that may be drawn, the most likely ones, where a model draws code by code; 0 is all, -1 leaves it
    open."""
    top_p: float = -1.0
    """Nucleus sampling, likewise: the fewest most likely tokens whose probabilities sum to this; 1 is all, -1 leaves it
    open."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_drawing(self)

    def drawing(self) -> dict[str, float]:
        """What is not left open, by name."""
        values = {name: getattr(self, name) for name in DRAWING}
        return {name: value for name, value in values.items() if value > 0 or (name != "num_steps" and value == 0)}


@dataclass(frozen=True, kw_only=True, slots=True)
class CurationConfig(DrawingConfig):
    """Candidates of a record, their scores, and which become a pair."""

    num_images: int = 8
    """Images drawn for each prompt."""
    temperature: float = 1.0
    """Sampling temperature of image tokens: candidates should differ. 0 takes the most likely ones, -1 what [drawing]
    says."""
    caption_temperatures: tuple[float, ...] = (0.1, 0.7, 1.0)
    """Sampling temperatures of captions; each is combined with each top-k."""
    caption_top_k: tuple[int, ...] = (2, 4, 8)
    """Numbers of most likely tokens that captions are drawn from; 0 is all."""
    include_greedy: bool = True
    """Add the greedy caption."""
    score: str = "soft"
    """An image's score: soft, the mean probability of the right answers; hard, the fraction answered right; mixed, soft
    times the probability of its prompt, a token; or "module:function" of your own."""
    threshold: float = 0.6
    """The best image must score above this (HermesFlow, arXiv 2502.12148, section 3)."""
    margin: float = 0.1
    """The best must score above the worst by at least this much."""
    caption_scorer: str = "token-f1"
    """How a caption is compared with the true one: bert-cls, sentence, exact, normalized, token-f1, attribute-f1, or
    "module:function" of your own."""
    answer_scorer: str = "likelihood"
    """How the model's answer is found: likelihood of each choice, or the choice that its free answer matches by
    sentence, exact, normalized, or "module:function" of your own."""
    bert_model: str = "bert-large-uncased"
    """Hub id or folder of the model of bert-cls (as in the published code)."""
    sentence_model: str = "sentence-transformers/all-mpnet-base-v2"
    """Hub id or folder of the sentence encoder (as in the published code)."""
    win_image: Literal["best", "real"] = "best"
    """The win of an image pair: the best candidate, or the record's real image, as SPIN has it (arXiv 2401.01335)."""
    lose_caption: Literal["worst", "alike"] = "worst"
    """The lose of a caption pair: the worst candidate, or of those that score lower than the win the one with the most
    similar wording: about facts alone, where caption_scorer is."""
    keep: Literal["both", "any"] = "both"
    """Keep a record only if both sides make a pair, or for any side that does."""
    batch_records: int = 32
    """Records worked on together, and the records in one file of candidates."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_at_least(self, 2, "num_images")
        _check_at_least(self, 1, "batch_records")
        _check_drawing(self)
        if ":" in self.score:  # a function's scores have a scale of their own
            _check(self, ("threshold",), math.isfinite, "a finite number")
            _check(self, ("margin",), lambda value: 0 <= value < math.inf, "a finite number of at least 0")
        else:
            _check_between(self, 0, 1, "threshold", "margin")
        _check_at_least(self, 0, "caption_temperatures", "caption_top_k")
        _check_scale(self, "caption_temperatures")
        _check_name(self, "score", IMAGE_SCORERS, "function")
        _check_name(self, "caption_scorer", CAPTION_SCORERS, "function")
        _check_name(self, "answer_scorer", ANSWER_SCORERS, "function")
        if self.num_captions < 2:
            reason = "expected at least 2 captions from include_greedy and temperatures x top-k, got "
            raise ConfigError("CurationConfig", "caption_temperatures", f"{reason}{self.num_captions}")

    @property
    def num_captions(self) -> int:
        """Captions of each image."""
        return int(self.include_greedy) + len(self.caption_temperatures) * len(self.caption_top_k)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Pair-DPO (HermesFlow, arXiv 2502.12148, section 4)."""

    num_steps: int = 48
    """Optimizer steps, of each round."""
    pairs_per_step: int = 32
    """Pairs in one optimizer step, of all processes together."""
    tokens_per_pass: int = 16384
    """Most packed tokens in one forward and backward pass of a process; a step takes as many passes as it needs."""
    lr: float = 7e-5
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    warmup_steps: int = 5
    """Steps in which the learning rate rises to its peak; then it falls by a cosine to 0 at num_steps."""
    max_grad_norm: float = 1.0
    """The gradient of all weights together is scaled down to this norm where it is larger."""
    loss_type: str = "sigmoid"
    """Form of the preference loss: sigmoid (the paper's), ipo, hinge, robust, simpo, which needs no reference, or
    "module:object" of your own."""
    beta: float = 0.2
    """Scale of the rewards, log-ratios of policy to reference: the larger, the nearer the policy stays to it."""
    generation_beta: float = 0.0
    """Of the image side alone, whose sums may be over many more tokens than a caption's; 0 takes beta."""
    understanding_beta: float = 0.0
    """Of the caption side alone; 0 takes beta."""
    label_smoothing: float = 0.0
    """Share of pairs that are taken for wrongly ordered, below 0.5; for sigmoid and robust."""
    simpo_margin: float = 0.5
    """Margin by which simpo wants the win's reward to exceed the lose's."""
    length_normalize: bool = False
    """Log-probability of an image or caption: the mean over its tokens instead of their sum; simpo always takes it."""
    generation_weight: float = 1.0
    """Weight of the image side; 0 leaves it out."""
    understanding_weight: float = 0.1
    """Weight of the caption side; 0 leaves it out, 1 is the paper's. The larger, the more the answers to hard questions
    suffer."""
    preference_weight: float = 1.0
    """Weight of the preference loss; 0 leaves it out, which is supervised training on the wins alone."""
    nll_weight: float = 1.0
    """Weight of the win's negative log-likelihood (mean over its tokens), added to the loss; 0 adds none."""
    replay_weight: float = 5.0
    """Weight of the replay: questions about the pairs' real images, which keep the model from forgetting how to
    answer; 0 asks none. Measured were 5 for the reference and 0.3 for answers."""
    condition_dropout: float = 0.0
    """Share of image pairs that are trained with the empty prompt, win and lose alike; the published code has 0.1."""
    masks_per_pair: int = 4
    """Random masks of each image pair in one step, and of each caption pair of a bidirectional family; a
    log-probability is the mean over them."""
    complementary_masks: bool = True
    """Every second mask hides what the one before it shows, which lowers the variance; needs an even masks_per_pair."""
    elbo_weighting: bool = False
    """Weigh each mask so that the sum is an unbiased estimate of the image's evidence lower bound."""
    boundary_labels: bool = False
    """Count the tokens before and after an image as labels too, as the published code does."""
    replay_target: Literal["reference", "answers"] = "reference"
    """What is replayed: the reference's own probability of each choice, which the divergence KL(reference || policy)
    keeps; or the right answers, whose negative log-likelihood (mean over tokens) is lowered."""
    replayed_questions: int = 8
    """Questions of each pair in one step, drawn from those about its real image; where it has fewer, all of them."""
    reference: Literal["cached", "live"] = "cached"
    """When the reference computes: once, before the first step, or in each step (float32, one process, or adapters)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the passes; weights and optimizer stay float32. auto is bfloat16 on CUDA, else float32."""
    activation_checkpointing: bool = False
    """Keep only the input of each layer and compute the rest again in the backward pass."""
    compile: bool = False
    """Run the layers through torch.compile."""
    lora_rank: int = 0
    """Train low-rank adapters of this rank, through peft, instead of all weights; 0 trains all weights."""
    lora_alpha: float = 16.0
    """The adapters' output is scaled by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = ("qkv", "out", "up", "down")
    """Layers that get an adapter."""
    holdout_pairs: int = 0
    """Pairs kept out of training, whose loss is measured; 0 measures none."""
    holdout_every: int = 10
    """Steps between measurements of the held-out loss."""
    patience: int = 3
    """Measurements in a row without a new least held-out loss that end training; the weights are then the best ones."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where metrics go besides metrics.jsonl, and each round's measurement, first drawings and first pairs; the package
    must be installed."""
    checkpoint_every: int = 20
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many checkpoints are kept, the newest ones."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_at_least(self, 1, "num_steps", "pairs_per_step", "tokens_per_pass", "checkpoint_every")
        _check_at_least(self, 1, "keep_checkpoints", "masks_per_pair", "holdout_every", "patience")
        _check_above(self, 0, "lr", "beta", "max_grad_norm", "lora_alpha")
        _check_at_least(self, 0, "generation_beta", "understanding_beta")
        _check_scale(self, "beta", "generation_beta", "understanding_beta")
        _check_at_least(self, 0, "weight_decay", "warmup_steps", "simpo_margin", "lora_rank", "holdout_pairs")
        _check_at_least(self, 0, "generation_weight", "understanding_weight", "preference_weight", "nll_weight")
        _check_at_least(self, 0, "replay_weight")
        _check_at_least(self, 1, "replayed_questions")
        _check_between(self, 0, 1, "condition_dropout")
        _check_between(self, 0, 2**16, "lora_rank")
        _check_name(self, "loss_type", (*LOSS_TYPES, *LOSSES))
        _check(self, ("label_smoothing",), lambda value: 0 <= value < 0.5, "0 to below 0.5")
        if not self.generation_weight and not self.understanding_weight:
            raise ConfigError("TrainConfig", "generation_weight", "expected a side of weight above 0, got 0 for both")
        if self.complementary_masks and self.masks_per_pair % 2:
            reason = f"expected an even masks_per_pair with it, got {self.masks_per_pair}"
            raise ConfigError("TrainConfig", "complementary_masks", reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class GRPOConfig:
    """GRPO on the images that the model draws as it learns (selfplay.algorithm grpo), or the captions (caption-grpo).

    Steps, rates, replay and reference are those of [train]; images are drawn as [curation] says.
    """

    prompts_per_step: int = 16
    """Prompts that images are drawn for in one optimizer step, by all processes together."""
    num_images: int = 8
    """Images drawn for each prompt: a group, within which rewards are compared."""
    rewards: tuple[str, ...] = ("log", "prompt")
    """What an image is rewarded for: log, the log-probability of the right answers; soft, their mean probability; hard,
    the fraction answered right; prompt, the log-probability of its prompt; mixed, see curation.score; or
    "module:function" of your own."""
    reward_weights: tuple[float, ...] = (1.0, 0.5)
    """Of each reward, in their sum."""
    likelihood: Literal["kept", "drawn", "masked"] = "kept"
    """Of an image: the codes that each decoding step kept; drawn, all that it drew, those that were masked again too;
    or masked, its codes under random masks without guidance, at times spread evenly from a random one: UniGRPO's
    estimate (arXiv 2505.15809)."""
    step_fractions: tuple[float, ...] = (0.5, 1.0)
    """Of the decoding steps that [curation] or the model says, what rollouts take in turn: a gain should not hang on
    one number of steps."""
    trained_steps: int = 0
    """Decoding steps of each image that the gradient is computed for, drawn at random; 0 takes all of them. Of
    likelihood masked its masks; 0 takes as many as there were steps."""
    train_unguided: bool = False
    """Send the gradient through the unguided half of guidance too, which costs as much as the guided one."""
    updates_per_rollout: int = 1
    """Optimizer steps on the same images, of which all but the first are off the policy that drew them."""
    clip_low: float = 0.1
    """A decoding step's ratio of policy to the policy that drew counts down to 1 - clip_low."""
    clip_high: float = 0.2
    """The same ratio counts up to 1 + clip_high."""
    kl_weight: float = 0.0
    """Weight of the divergence from the reference on the images drawn, a code (Schulman's k3); it needs train.reference
    live."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_at_least(self, 1, "prompts_per_step", "updates_per_rollout")
        _check_at_least(self, 2, "num_images")
        _check_at_least(self, 0, "trained_steps", "kl_weight")
        _check_between(self, 0, 1, "clip_low")
        _check_above(self, 0, "clip_high")
        _check_name(self, "rewards", REWARDS, "function")
        _check(self, ("reward_weights",), lambda value: abs(value) <= 1e6, "-1e6 to 1e6")
        _check(self, ("step_fractions",), lambda value: 0 < value <= 16, "above 0 to 16")
        if not self.step_fractions:
            raise ConfigError("GRPOConfig", "step_fractions", "expected at least one, got none")
        if not self.rewards or len(self.reward_weights) != len(self.rewards):
            reason = f"expected a weight for each of {len(self.rewards)} rewards, got {len(self.reward_weights)}"
            raise ConfigError("GRPOConfig", "reward_weights", reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnDrawingsConfig:
    """Answers learned from the model's own drawings, whose labels are the captions (selfplay.algorithm own-drawings).

    Steps, rates and questions of real images are those of [train]; images are drawn as [drawing] says.
    """

    element_types: tuple[str, ...] = ("spatial",)
    """Questions of these types are taught: choose what the model paints better than it reads. Of a drawing, all other
    questions must be answered as its caption does."""
    num_images: int = 2
    """Images drawn of each caption."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_at_least(self, 1, "num_images")
        if not self.element_types:
            raise ConfigError("OwnDrawingsConfig", "element_types", "expected at least one, got none")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig(DrawingConfig):
    """Measurement on prompts that training never sees."""

    suite: str = "builtin"
    """What is measured: "builtin", the world of shapes, or with eval.data the records there; "records"; or
    "module:object" of your own."""
    data: str = ""
    """A file of held-out records to measure on, in the forms of data.source."""
    questions: str = ""
    """A file of questions that are joined to them by id."""
    root: str = ""
    """Folder that their image paths start from and may not leave; empty is the folder of the file."""
    judge: str = "self"
    """Who says whether images drawn of their captions are right: "self", the model's own answers, or the address of an
    OpenAI-compatible endpoint."""
    split: Literal["train", "validation", "test"] = "test"
    """Scenes to measure on: choose settings on "validation", report results on "test"."""
    num_prompts: int = 300
    """Prompts that images are drawn for."""
    images_per_prompt: int = 4
    """Images drawn for each prompt; with fewer than 4 the best of 4 is not measured."""
    samplers: tuple[str, ...] = ("4/1", "4/0.7", "8/0.7")
    """Further ways to draw that generation is measured by, "STEPS/TEMPERATURE" each: a gain should not hang on one."""
    num_understanding: int = 600
    """Images that questions are asked about."""
    seed: int = 1234
    """Seed of prompts and images, the same before and after each round."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_seed(self)
        _check_name(self, "suite", EVALUATIONS)
        _check_at_least(self, 1, "num_prompts", "images_per_prompt", "num_understanding")
        _check_drawing(self)
        _check_samplers(self)
        if self.judge != "self" and not self.judge.startswith(("http://", "https://")):
            raise ConfigError("EvalConfig", "judge", f'expected "self" or an address, got "{self.judge}"')
        for name in ("questions", "root"):
            if getattr(self, name) and not self.data:
                raise ConfigError(
                    "EvalConfig", name, "belongs to a file of records in eval.data; give one, or leave it out"
                )
        if self.suite == "records" and not self.data:
            raise ConfigError("EvalConfig", "data", 'expected a file of records with eval.suite "records", got none')

    @property
    def measures(self) -> str:
        """The evaluation that is meant."""
        return "records" if self.data and self.suite == "builtin" else self.suite


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfPlayConfig:
    """Rounds of curation, training and evaluation."""

    num_rounds: int = 3
    """Rounds in the run."""
    fresh_prompts: bool = True
    """Take new prompts in each round; otherwise the same again, with the paper's rule for replacing win and lose."""
    algorithm: str = "pair-dpo"
    """What trains in a round: pair-dpo, on pairs of best and worst; grpo, on images that are drawn and rewarded as the
    model learns; caption-grpo, on captions likewise, in models that fill text from masks; own-drawings, on answers
    about own drawings; or "module:class" of your own."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_at_least(self, 1, "num_rounds")
        _check_name(self, "algorithm", ALGORITHMS)


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """How the tiny model is made from a seed: first its image tokenizer, then the transformer."""

    folder: str = "runs/pretrain"
    """Folder of checkpoints and of the finished model."""
    seed: int = 0
    """Seed of scenes, weights and batches."""
    images: Literal["masked", "causal", "flow"] = "masked"
    """How the model draws: all masked codes at once, in steps; code by code; or latents by a flow."""
    num_scenes: int = 50000
    """Training scenes that are drawn."""
    tokenizer_steps: int = 4000
    """Optimizer steps of the image tokenizer."""
    tokenizer_batch: int = 32
    """Images in one step of the tokenizer."""
    tokenizer_lr: float = 2e-3
    """Peak learning rate of the tokenizer."""
    steps: int = 1600
    """Optimizer steps of the transformer."""
    batch_images: int = 12
    """Captions in each of a step's two half-batches, each with two masked copies of its image."""
    batch_understanding: int = 32
    """Images captioned and asked about in each half-batch."""
    lr: float = 1.2e-3
    """Peak learning rate of the transformer."""
    warmup_steps: int = 200
    """Steps of linear warm-up before the cosine."""
    condition_dropout: float = 0.1
    """Fraction of prompts emptied, which teaches the unconditional branch of guidance."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    eval_every: int = 200
    """Steps between evaluations."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_seed(self)
        _check_at_least(self, 1, "num_scenes", "tokenizer_steps", "tokenizer_batch", "steps")
        _check_at_least(self, 1, "batch_images", "batch_understanding", "eval_every", "checkpoint_every")
        _check_above(self, 0, "tokenizer_lr", "lr")
        _check_at_least(self, 0, "warmup_steps", "weight_decay")
        _check_between(self, 0, 1, "condition_dropout")


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig:
    """Self-play against its controls: each arm is a run with some settings changed."""

    seeds: tuple[int, ...] = (101, 102, 103, 104, 105)
    """Seeds of data, candidates and training; one run of each arm for each."""
    arms: tuple[str, ...] = STUDY_ARMS
    """What is run: pair-dpo first, whose data the others share, then controls."""
    workers: int = 1
    """Processes; each takes whole seeds, with its share of the threads."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check(self, ("seeds",), lambda value: 0 <= value < 2**63, "seeds from 0 to 2**63 - 1")
        _check(self, ("arms",), lambda value: value in STUDY_ARMS, f"some of {', '.join(STUDY_ARMS)}")
        _check_at_least(self, 1, "workers")
        for name in ("seeds", "arms"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                reason = f"expected at least one, none of them twice, got {_toml_value(values)}"
                raise ConfigError("StudyConfig", name, reason)
        if self.arms[0] != STUDY_ARMS[0]:
            raise ConfigError("StudyConfig", "arms", f"expected {STUDY_ARMS[0]} first, got {_toml_value(self.arms)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All settings of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    drawing: DrawingConfig = field(default_factory=DrawingConfig)
    curation: CurationConfig = field(default_factory=CurationConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    own_drawings: OwnDrawingsConfig = field(default_factory=OwnDrawingsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    selfplay: SelfPlayConfig = field(default_factory=SelfPlayConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    study: StudyConfig = field(default_factory=StudyConfig)
    round: dict[int, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Round -> section -> key -> the value that this round has in place of the run's."""

    def of_round(self, number: int) -> "Config":
        """The settings of one round."""
        changed = self.round.get(number, {})
        return replace(self, **{section: replace(getattr(self, section), **keys) for section, keys in changed.items()})

    def each_round(self) -> Iterable["Config"]:
        """The settings of round 1, 2, ..."""
        return map(self.of_round, range(1, self.selfplay.num_rounds + 1))

    def drawn_by(self, section: Any) -> Any:
        """The curation or eval section, with what it leaves open about drawing taken from [drawing]."""
        return replace(section, **self.drawing.drawing() | section.drawing())

    @property
    def run_folder(self) -> Path:
        """The folder of this run."""
        return Path(self.run.folder) / self.run.name


ALSO_CALLED = {
    "learning_rate": "train.lr", "batch_size": "train.pairs_per_step", "max_steps": "train.num_steps",
    "num_train_epochs": "train.num_steps", "epochs": "train.num_steps", "warmup_ratio": "train.warmup_steps",
    "gradient_clipping": "train.max_grad_norm", "gradient_checkpointing": "train.activation_checkpointing",
    "bf16": "train.dtype", "report_to": "train.tracker", "save_steps": "train.checkpoint_every",
    "lora_r": "train.lora_rank", "rounds": "selfplay.num_rounds", "output_dir": "run.folder",
    "num_generations": "grpo.num_images", "epsilon": "grpo.clip_low", "cfg_scale": "drawing.guidance_scale",
    "num_inference_steps": "drawing.num_steps", "model_name_or_path": "model.name", "dataset": "data.source",
}  # fmt: skip
"""Our keys by other trainers' names, for the message on an unknown key."""

_SECTIONS: dict[str, type] = {name: cls for name, cls in get_type_hints(Config).items() if name != "round"}
_KEYS: dict[str, list[str]] = {name: [item.name for item in fields(cls)] for name, cls in _SECTIONS.items()}
_OF_A_ROUND = ("data.num_records", "selfplay.algorithm", "curation.", "train.", "grpo.", "own_drawings.")
"""How the settings begin that a round may have of its own."""
_ROUND_TAKES = ", ".join(name.rstrip(".") for name in _OF_A_ROUND)


def load_config(path: str | os.PathLike | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read the settings of a run.

    Args:
        path: a TOML file with a table a section, or None for the defaults.
        overrides: "section.key=value" each, with the value in TOML; a number or truth value also as Python writes it
            (.5, False), and a whole number as 1e3. What is neither is taken as a string.
    Returns: the checked settings.
    Raises: InputError on a file that cannot be read, an unknown key, a wrong type or a value out of range.
    """
    values: dict[str, dict[str, Any]] = {section: {} for section in _SECTIONS}
    sources: dict[tuple[str, str], str] = {}
    for section, key, value in _read_toml(path) if path is not None else ():
        values.setdefault(section, {})[key] = value
        sources[section, key] = str(path)
    for override in overrides:
        section, key, value = _parse_override(override)
        values.setdefault(section, {})[key] = value
        sources[section, key] = _cut(override)
    config = Config(**{section: _make_section(section, values.pop(section), sources) for section in _SECTIONS})
    for name, changed in values.items():
        _set_round(config, name, changed, sources)
    return config


def _set_round(config: Config, name: str, changed: dict[str, Any], sources: dict[tuple[str, str], str]) -> None:
    """Checks the settings of a table such as round.2.train, and adds them to config.round."""
    number, section = int(name.split(".")[1]), name.split(".")[2]
    source = sources[name, next(iter(changed))]
    if number > config.selfplay.num_rounds:
        raise InputError(
            f"{source}: round.{number}: the run has rounds 1 to {config.selfplay.num_rounds}; raise "
            "selfplay.num_rounds, or give one of them"
        )
    if section == "data" and not config.selfplay.fresh_prompts:
        raise InputError(
            f"{source}: {name}: every round has the same records where selfplay.fresh_prompts is false; "
            "set data.num_records alone"
        )
    whole = {key: getattr(getattr(config, section), key) for key in _KEYS[section]}
    made = _make_section(name, whole | changed, sources)
    config.round.setdefault(number, {})[section] = {key: getattr(made, key) for key in changed}


def parse_sampler(text: str) -> dict[str, Any]:
    """What a way to draw such as "4/0.7" sets: num_steps and temperature."""
    num_steps, temperature = text.split("/")
    return {"num_steps": int(num_steps), "temperature": float(temperature)}


def print_of(section: Any, first: Sequence[str], without: Sequence[str]) -> list[Any]:
    """The settings of a section that some file depends on, for its fingerprint.

    Args:
        section: the section.
        first: names whose values come first, in this order, as files of older versions have them.
        without: names that the file does not depend on.
    Returns: their values, then [name, value] of every other setting that is not the default: one that nobody thought of
        counts, and files that were made before it was added are found again.
    """
    others = [item for item in fields(section) if item.name not in (*first, *without)]
    return [getattr(section, name) for name in first] + [
        [item.name, getattr(section, item.name)] for item in others if getattr(section, item.name) != item.default
    ]


def to_toml(config: Config) -> str:
    """The settings as TOML, which load_config reads back to an equal Config.

    Args:
        config: the settings.
    Returns: one table a section, each key with its meaning in a comment.
    """
    lines = []
    for section, cls in _SECTIONS.items():
        docs = _field_docs(cls)
        lines.append(f"[{section}]")
        for key in _KEYS[section]:
            lines.append(f"{key} = {_toml_value(getattr(getattr(config, section), key))}  # {docs[key]}")
        lines.append("")
    lines.append(f"# A table such as [round.2.train] has settings for one round, of {_ROUND_TAKES}.")
    for number, sections in config.round.items():
        for section, keys in sections.items():
            lines += [f"[round.{number}.{section}]", *(f"{key} = {_toml_value(keys[key])}" for key in keys), ""]
    return "\n".join(lines)


def _read_toml(path: str | os.PathLike) -> Iterable[tuple[str, str, Any]]:
    data = read_bytes(path)
    try:
        tables = tomllib.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML, a number of thousands of digits
        raise InputError(f"{path}: not a TOML file ({error}); correct that place") from error
    rounds = tables.pop("round", {})
    for section, table in tables.items():
        if section not in _SECTIONS and not isinstance(table, dict):
            raise _unknown(str(path), section, setting_names(), "; write it below its section, such as [train]")
        if section not in _SECTIONS:
            raise _unknown(str(path), section, _SECTIONS)
        if not isinstance(table, dict):
            raise InputError(f"{path}: {section}: expected a table [{section}], got {_describe(table)}")
        for key, value in table.items():
            if key not in _KEYS[section]:
                raise _unknown(str(path), f"{section}.{key}", setting_names())
            yield section, key, value
    for name, value in _leaves({"round": rounds}, depth=4):
        yield *_split_name(str(path), name), value


def _leaves(table: dict[str, Any], depth: int, above: str = "") -> Iterable[tuple[str, Any]]:
    """Dotted name and value of what lies so deep in tables, or is none."""
    for key, value in table.items():
        if depth > 1 and isinstance(value, dict):
            yield from _leaves(value, depth - 1, f"{above}{key}.")
        else:
            yield above + key, value


def _split_name(source: str, name: str) -> tuple[str, str]:
    """The table and the key of a setting such as train.lr, or round.2.train.lr for one round. Raises: InputError."""
    known = setting_names()
    of_round = re.fullmatch(r"round\.[1-9][0-9]{0,5}\.(.+)", name)
    if of_round or name.partition(".")[0] == "round":
        known = [each for each in known if each.startswith(_OF_A_ROUND)]
    if (of_round[1] if of_round else name) not in known:
        fix = f"; a round's own is round.NUMBER.section.key, of {_ROUND_TAKES}"
        raise _unknown(source, name, known, fix if name.partition(".")[0] == "round" else "")
    return name.rpartition(".")[0], name.rpartition(".")[2]


def _parse_override(override: str) -> tuple[str, str, Any]:
    name, equals, text = override.partition("=")
    source = _cut(override)
    if not equals:
        raise InputError(f"{source}: expected section.key=value, got no '='; write for example train.lr=1e-5")
    text = text.strip()
    section, key = _split_name(source, name.strip())
    return section, key, _parse_value(text, get_type_hints(_SECTIONS[section.rpartition(".")[2]])[key])


def _cut(override: str) -> str:
    """An override, for the start of a message: what should be there is said behind it."""
    return override if len(override) <= 200 else f"{override[:200]}..."


def _parse_value(text: str, expected: Any) -> Any:
    """A value of the command line, for a setting of this type."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        parsed = {}
    value = parsed["value"] if set(parsed) == {"value"} else text
    if expected is str and not isinstance(value, str):
        return text  # run.name=3 means the name "3"
    if expected is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if expected in (int, float) and value is text:
        with contextlib.suppress(ValueError):
            value = float(text)
        with contextlib.suppress(ValueError):
            value = int(text)
    is_whole = expected is int and isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return int(value) if is_whole else value


def _make_section(section: str, values: dict[str, Any], sources: dict[tuple[str, str], str]) -> Any:
    try:
        return _SECTIONS[section.rpartition(".")[2]](**values)
    except ConfigError as error:
        source = sources.get((section, error.key), "settings")
        raise InputError(f"{source}: {section}.{error.key}: {error.reason}") from error


def setting_names() -> list[str]:
    """All settings, as section.key."""
    return [f"{section}.{key}" for section, keys in _KEYS.items() for key in keys]


def _unknown(source: str, name: str, candidates: Iterable[str], fix: str = "") -> InputError:
    candidates = list(candidates)
    last = name.rpartition(".")[2]
    # A right key in the wrong section is the likelier slip than a misspelt section.
    same = [candidate for candidate in candidates if candidate.rpartition(".")[2] == last]
    nearest = difflib.get_close_matches(name, same or candidates, n=1, cutoff=0.0)[0]
    if not same and ALSO_CALLED.get(last) in candidates:
        nearest = ALSO_CALLED[last]
    return InputError(f"{source}: unknown key {name}; the nearest is {nearest}{fix}")


def _check_types(section: Any) -> None:
    """Check each field against its annotation; whole numbers become floats and lists tuples where those are due.

    A text that begins with ~ is a path in the home folder, whatever the field, and is written out.
    """
    for name, expected in get_type_hints(type(section)).items():
        value = getattr(section, name)
        try:
            converted = _convert(value, expected)
        except (TypeError, OverflowError):
            reason = f"expected {_describe_type(expected)}, got {_describe(value)}"
            raise ConfigError(type(section).__name__, name, reason) from None
        except InputError as error:
            raise ConfigError(type(section).__name__, name, str(error)) from error
        object.__setattr__(section, name, converted)


def _convert(value: Any, expected: Any) -> Any:
    if get_origin(expected) is Literal:
        if isinstance(value, str) and value in get_args(expected):
            return value
    elif get_origin(expected) is tuple:
        if isinstance(value, list | tuple):
            return tuple(_convert(item, get_args(expected)[0]) for item in value)
    elif expected is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif expected is str:
        if isinstance(value, str):
            return _usable_text(value)
    elif type(value) is expected:
        return value
    raise TypeError


def _usable_text(value: str) -> str:
    """A text with its ~ written out. Raises: InputError if a file's name or a settings file cannot hold it."""
    if "\0" in value:
        raise InputError(f"text: expected no null character, got {value!r}; leave it out")
    return expand_home(check_unicode(value, "text"))


def _describe_type(expected: Any) -> str:
    if get_origin(expected) is Literal:
        return "one of " + ", ".join(json.dumps(choice) for choice in get_args(expected))
    if get_origin(expected) is tuple:
        example = {int: "[2, 4, 8]", float: "[0.1, 0.7]", str: '["qkv", "out"]'}[get_args(expected)[0]]
        return f"a list of {get_args(expected)[0].__name__} such as {example}"
    return {
        bool: "true or false",
        int: "a whole number (int)",
        float: "a finite number (float)",
        str: "a string in quotes",
    }[expected]


def _describe(value: Any) -> str:
    kind = {str: "string", dict: "table", list: "list", tuple: "list"}.get(type(value), type(value).__name__)
    return f"{value!r} ({kind})"


def _check_name(section: Any, name: str, known: Iterable[str], kind: str = "object") -> None:
    expected = f'{", ".join(known)}, or "module:{kind}"'
    _check(section, (name,), lambda value: value in known or re.fullmatch(r"[\w.]+:\w+", value), expected)


def _check_seed(section: Any) -> None:
    _check(section, ("seed",), lambda value: 0 <= value < 2**63, "a seed from 0 to 2**63 - 1")


def _check_samplers(section: Any) -> None:
    expected = 'texts such as "4/0.7", at least one step and a temperature of at least 0'
    _check(section, ("samplers",), lambda value: re.fullmatch(r"[1-9][0-9]*/([0-9]+\.)?[0-9]+", value), expected)
    expected = "at most 65536 steps, and a temperature of 0 or 1e-6 to 1e6"
    _check(section, ("samplers",), lambda value: _is_sampler_in_range(*value.split("/")), expected)


def _is_sampler_in_range(num_steps: str, temperature: str) -> bool:
    return (
        len(num_steps) < 6 and int(num_steps) <= 2**16 and (1e-6 <= float(temperature) <= 1e6 or not float(temperature))
    )


def _check_drawing(section: Any) -> None:
    _check(section, DRAWING[:1], lambda value: 0 <= value <= 2**16, "1 to 65536, or 0 to leave it open")
    _check(
        section,
        DRAWING[1:4],
        lambda value: value in (0, -1) or 1e-6 <= value <= 1e6,
        "at least 0, or -1 to leave it open, and 1e-6 to 1e6 if not 0",
    )
    _check(section, ("top_k",), lambda value: -1 <= value < 2**31, "at least 0, or -1 to leave it open")
    _check(section, ("top_p",), lambda value: value == -1 or 0 <= value <= 1, "0 to 1, or -1 to leave it open")


def _check_at_least(section: Any, low: float, *names: str) -> None:
    _check(section, names, lambda value: value >= low, f"at least {low}")
    _check_at_most(section, *names)


def _check_above(section: Any, low: float, *names: str) -> None:
    _check(section, names, lambda value: value > low, f"more than {low}")
    _check_at_most(section, *names)


def _check_at_most(section: Any, *names: str) -> None:
    """Beyond these the arithmetic of float32 and of indices overflows, far from the setting that made it."""
    _check(section, names, lambda value: isinstance(value, int) or abs(value) <= 1e6, "at most 1e6")
    _check(section, names, lambda value: isinstance(value, float) or value < 2**31, f"at most {2**31 - 1}")


def _check_scale(section: Any, *names: str) -> None:
    """Of what is divided by."""
    _check(section, names, lambda value: value == 0 or 1e-6 <= value <= 1e6, "1e-6 to 1e6 if not 0")


def _check_between(section: Any, low: float, high: float, *names: str) -> None:
    _check(section, names, lambda value: low <= value <= high, f"{low} to {high}")


def _check(section: Any, names: Iterable[str], allowed: Any, expected: str) -> None:
    for name in names:
        value = getattr(section, name)
        if not all(allowed(item) for item in (value if isinstance(value, tuple) else (value,))):
            raise ConfigError(type(section).__name__, name, f"expected {expected}, got {_toml_value(value)}")


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML asks to escape this one too
    return repr(value)


@functools.cache
def _field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a section, and of those that it inherits."""
    inherited = _field_docs(cls.__base__) if cls.__base__ is not object else {}
    body = ast.parse(inspect.getsource(cls)).body[0].body
    return inherited | {
        named.target.id: inspect.cleandoc(text.value.value).replace("\n", " ")
        for named, text in zip(body, body[1:], strict=False)
        if isinstance(named, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
