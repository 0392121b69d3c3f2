"""One call makes an instance of the published Showo class fast: accelerate(model), and restore(model) undoes it.

The caller's mask is read once and becomes a span tree, so that what the published methods compute again, or compute for
nothing (pads, the whole vocabulary at every position, all earlier tokens for each new one), is not computed. Weights,
signatures and what is returned stay as they are. A call that is none of the published ones goes to the original method,
and a warning says why, once.
Source: models/modeling_showo.py of Show-o (arXiv 2408.12528) and HermesFlow (arXiv 2502.12148).
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hermesflow.drop_in.attention_masks import ImageFirst, ImageLast, Reading, UnknownMaskError, read_masks
from hermesflow.drop_in.functional import draw_seeds
from hermesflow.drop_in.label_scoring import ScoredLabels, logprob_sums
from hermesflow.engine.answer_sampler import FAILED, GOES_ON, Answers, AnswerSampler, SamplingParams
from hermesflow.engine.decoders.masked import ImageDecoder, ImageSamplingParams
from hermesflow.engine.device_graph import DeviceGraph
from hermesflow.engine.engine import Engine
from hermesflow.engine.nan_cause import likely_cause
from hermesflow.engine.shared_transformer import SharedTransformer, has_hooks, is_hooked
from hermesflow.engine.token_layout import SPECIAL_TOKENS, TokenLayout
from hermesflow.engine.transformer import Embeds, Transformer, TransformerConfig
from hermesflow.kernels.checks import FLOAT_DTYPES
from hermesflow.kernels.span_tree import SpanTree
from hermesflow.models import showo
from hermesflow.runtime.files import InputError

METHODS = ("t2i_generate", "mmu_generate", "loss_for_unidpo", "loss_for_dpo", "loss_for_dpo_understanding")
"""What accelerate replaces; a class has the first two, and the losses if it can be trained on pairs."""
_OF_LOSSES = ("input_ids", "input_embeddings", "attention_mask", "labels", "label_smoothing")
_HOTTEST = 4.0
"""Temperature of the first step from which on noise may come near the confidence 88.7 that the original gives to known
tokens: a Gumbel beyond 15 has a chance of 3e-7."""
_PARAMETERS = {
    "forward": None,
    "t2i_generate": (
        "input_ids", "uncond_input_ids", "attention_mask", "temperature", "timesteps", "guidance_scale",
        "noise_schedule", "generator", "config", "kwargs",
    ),
    "mmu_generate": (
        "idx", "input_embeddings", "attention_mask", "max_new_tokens", "temperature", "top_k", "eot_token",
    ),
    "loss_for_unidpo": (*_OF_LOSSES, "batch_size_t2i", "batch_size_mmu", "max_seq_length"),
    "loss_for_dpo": (*_OF_LOSSES, "batch_size_t2i", "max_seq_length"),
    "loss_for_dpo_understanding": (
        *_OF_LOSSES, "batch_size_mmu", "max_seq_length", "labels_mask_text", "labels_mask_image", "kwargs",
    ),
}  # fmt: skip
"""Names of the published parameters; forward's are not looked at."""

logger = logging.getLogger("hermesflow.drop_in")


def accelerate(model: nn.Module) -> nn.Module:
    """Replaces METHODS of a published Showo instance by fast ones, in place.

    Args:
        model: the instance, or a wrapper around it: DistributedDataParallel, torch.compile, peft's PeftModel.
    Returns: model.
    Raises: ValueError if it is no such instance; the message says what was looked for and what was found.
    """
    owner = _unwrap(model, "accelerate")
    if any(isinstance(vars(owner).get(name), AcceleratedMethod) for name in METHODS):
        return model
    problems = _problems(owner)
    if problems:
        raise ValueError(
            "accelerate: looked for an instance of the published Showo class (.showo with Phi's layers, "
            f".config.mask_token_id, t2i_generate, mmu_generate), found {type(owner).__name__}: "
            f"{'; '.join(problems)}; give the model that Showo.from_pretrained returns"
        )
    acceleration = _Acceleration(owner)
    for name in METHODS:
        if _definer(owner, name):
            setattr(owner, name, AcceleratedMethod(acceleration, name))
    return model


def restore(model: nn.Module) -> nn.Module:
    """Gives the original methods back; nothing happens to a model that has them. Returns: model."""
    owner = _unwrap(model, "restore")
    for name in METHODS:
        if isinstance(vars(owner).get(name), AcceleratedMethod):
            delattr(owner, name)
    return model


class AcceleratedMethod:
    """What stands in place of a method; it is copied and pickled together with its model."""

    def __init__(self, acceleration: _Acceleration, name: str) -> None:
        """
        Args:
            acceleration: of the model.
            name: one of METHODS.
        """
        self.acceleration, self.__name__ = acceleration, name
        self.__qualname__ = f"{type(acceleration.owner).__qualname__}.{name}"

    @property
    def original(self) -> Callable:
        """The method as it was."""
        owner = self.acceleration.owner
        return getattr(type(owner), self.__name__).__get__(owner)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    @property
    def __doc__(self) -> str | None:
        return self.original.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the original returns."""
        arguments = self.__signature__.bind(*args, **kwargs)
        arguments.apply_defaults()
        try:
            return self.acceleration.run(self.__name__, arguments.arguments)
        except NotCoveredError as reason:
            self.acceleration.warn_once(self.__name__, str(reason))
        return self.original(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<accelerated {self.__qualname__}>"

    def __reduce__(self) -> tuple:
        return AcceleratedMethod, (self.acceleration, self.__name__)


class NotCoveredError(Exception):
    """A call that only the original method answers; the message says why."""


class _Acceleration:
    """What the methods of one model share; built when it is first needed, and again when modules were replaced."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self._warned: set[tuple[str, str]] = set()
        self._built_from: list[nn.Module] = []
        self._transformer: SharedTransformer | None = None
        self._engine: Engine | None = None

    def __reduce__(self) -> tuple:
        return _Acceleration, (self.owner,)

    def warn_once(self, name: str, reason: str) -> None:
        """Logs a method's reason once, whatever numbers are in it."""
        kind = name, re.sub(r"[\d.,-]+", "", reason)
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("%s: %s; the original method runs instead", name, reason)

    def run(self, name: str, arguments: dict[str, Any]) -> Any:
        """The fast method. Raises: NotCoveredError."""
        transformer = self.transformer()
        try:
            with transformer.precision.of_caller(transformer.embed.weight.device):
                return _FAST[name](self, transformer, **arguments)
        except UnknownMaskError as error:
            raise NotCoveredError(str(error)) from error

    def transformer(self) -> SharedTransformer:
        """Over the model's modules of now. Raises: NotCoveredError where they do more than ours would."""
        modules = list(self.owner.showo.modules())
        if self._transformer is None or modules != self._built_from:
            problems = _problems(self.owner)
            if problems:
                raise NotCoveredError(f"the model has changed: {'; '.join(problems)}")
            self._transformer, self._engine, self._built_from = _share(self.owner), None, modules
        _check_plain(self.owner, modules)
        return self._transformer

    def check_forward(self, transformer: SharedTransformer) -> None:
        """Raises NotCoveredError where a method that calls the model itself would run more than the class's forward."""
        own = vars(self.owner)
        # accelerate's forward is the class's under autocast: nothing new where the caller has it on.
        prepared = getattr(own.get("_original_forward"), "__func__", None) is type(self.owner).forward
        is_own = "forward" in own and not (prepared and transformer.precision.dtype)
        if has_hooks(self.owner) or is_own:
            raise NotCoveredError(
                "the model has hooks or a forward of its own, which would not run; call it under torch.autocast if the "
                "forward is accelerate's for mixed precision"
            )

    def free_images(self) -> None:
        """Lets go of what t2i_generate keeps on CUDA, for training needs the memory."""
        self._engine = None

    def engine(self, layout: TokenLayout) -> Engine:
        """Kept from call to call, since on CUDA it keeps graphs."""
        if self._engine is None or self._engine.layout != layout:
            self._engine = Engine(self._transformer, layout)
        return self._engine


def _generate_images(
    acceleration: _Acceleration,
    transformer: SharedTransformer,
    *,
    input_ids: Tensor,
    uncond_input_ids: Tensor | None,
    attention_mask: Tensor | None,
    temperature: float,
    timesteps: int,
    guidance_scale: float,
    noise_schedule: Callable[[Tensor], Tensor],
    generator: torch.Generator | None,
    config: Any,
    **_: Any,
) -> Tensor:
    """t2i_generate: codes int64 [B, N]. input_ids is not written to."""
    acceleration.check_forward(transformer)
    layout = _image_layout(acceleration.owner, transformer, config)
    is_guided = uncond_input_ids is not None and guidance_scale > 0
    rows = input_ids
    if is_guided:
        start = config.dataset.preprocessing.max_seq_length + 1
        rows = torch.cat([rows, torch.cat([uncond_input_ids[:, :start], input_ids[:, start:]], dim=1)])
    readings = read_masks(attention_mask, *rows.shape)
    prompts = [_prompt_of(ids, reading, layout) for ids, reading in zip(rows.tolist(), readings, strict=True)]
    count = len(input_ids)
    image = input_ids[:, -layout.num_image_tokens - 1 : -1]
    known = torch.where(image == layout.mask_id, -1, image - layout.code_offset)
    if ((known < -1) | (known >= layout.codebook_size)).any() or (known.eq(-1) & image.ne(layout.mask_id)).any():
        raise NotCoveredError("input_ids holds image tokens that are neither codes nor the mask")
    if (known >= 0).all(dim=1).any():
        raise NotCoveredError("an image has no token to draw, of which the original draws one anew all the same")
    if timesteps < 1:
        raise NotCoveredError(f"timesteps is {timesteps}, not at least 1")
    if not 0 <= temperature * (1 - 1 / timesteps) <= _HOTTEST:
        raise NotCoveredError(
            f"temperature {temperature} is below 0, or so high that the original masks known tokens again"
        )
    ratios = [float(noise_schedule(torch.tensor(1.0 * (step + 1) / timesteps))) for step in range(timesteps)]
    params = ImageSamplingParams(
        num_steps=timesteps,
        guidance_scale=float(guidance_scale) if is_guided else 0.0,
        mask_temperature=float(temperature),
        schedule=tuple(ratios),
        mask_decay="showo",
    )
    engine = acceleration.engine(layout)
    # Copies of weights in autocast's dtype end with this call, and adapters may change; a kept graph would not see it.
    is_kept = transformer.precision.dtype is None and transformer.has_plain_layers
    decoder = engine.image_decoder if is_kept else ImageDecoder(transformer, layout)
    seeds = draw_seeds(count, generator, input_ids.device)
    try:
        with torch.inference_mode():
            codes = decoder.generate(
                prompts[:count],
                seeds[:, None],
                params,
                unguided_ids=prompts[count:] or None,
                known_codes=known,
                max_sequences=engine.max_sequences,
            )
    except RuntimeError as error:
        if "no distribution" not in str(error):
            raise
        where = str(error).partition(": ")[2].rpartition("; ")[0]
        raise RuntimeError(f"t2i_generate: {where}; {likely_cause(acceleration.owner)}") from error
    return codes[:, 0].clone()  # a tensor made in inference mode cannot be used in training


class _FramedLayout(TokenLayout):
    """Of prompts that come with their special tokens."""

    def text_prompt(self, text_ids: Sequence[int]) -> list[int]:
        return list(text_ids)


def _image_layout(owner: nn.Module, transformer: Transformer, config: Any) -> TokenLayout:
    """The vocabulary as t2i_generate's config has it."""
    sizes = config.model.showo
    code_offset = sizes.llm_vocab_size + sizes.num_new_special_tokens
    try:
        layout = _FramedLayout(
            text_vocab_size=code_offset - 1 - len(SPECIAL_TOKENS),
            num_image_tokens=sizes.num_vq_tokens,
            codebook_size=transformer.config.vocab_size - 1 - code_offset,
            sot=0,
            eot=0,
        )
    except ValueError as error:
        raise NotCoveredError(f"config.model.showo does not fit the model ({error})") from error
    if layout.mask_id != owner.config.mask_token_id:
        raise NotCoveredError(f"mask_token_id is {owner.config.mask_token_id}, not the last id {layout.mask_id}")
    return layout


def _prompt_of(ids: list[int], reading: Reading, layout: TokenLayout) -> list[int]:
    """What stands before the image in a generation sequence, without pads."""
    image = len(ids) - layout.num_image_tokens - 2
    if not isinstance(reading, ImageLast) or reading.image != image or reading.first == image:
        raise NotCoveredError("the attention_mask is not that of text and then an image of num_vq_tokens")
    if (ids[image], ids[-1]) != (layout.soi, layout.eoi):
        raise NotCoveredError(f"the image is not between the ids of soi and eoi, {layout.soi} and {layout.eoi}")
    return ids[reading.first : image]


def _generate_text(
    acceleration: _Acceleration,
    transformer: SharedTransformer,
    *,
    idx: Tensor | None,
    input_embeddings: Tensor | None,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    eot_token: int | Tensor | None,
) -> list[Tensor]:
    """mmu_generate: tokens int64 0-dim, with eot if it came."""
    acceleration.check_forward(transformer)
    by_embeddings = bool(acceleration.owner.config.w_clip_vit)
    given, name = (input_embeddings, "input_embeddings") if by_embeddings else (idx, "idx")
    if given is None or (not by_embeddings and input_embeddings is not None):
        raise NotCoveredError(f"a model with w_clip_vit {by_embeddings} continues from {name} alone")
    if len(given) != 1:
        raise NotCoveredError(f"{name} holds {len(given)} sequences, not one")
    if isinstance(eot_token, Tensor) and eot_token.numel() == 1:
        eot_token = int(eot_token)
    for what, value, is_known in (
        ("max_new_tokens", max_new_tokens, max_new_tokens > 0),
        ("top_k", top_k, top_k is None or top_k > 0),
        ("temperature", temperature, 0 < temperature < math.inf),
        ("eot_token", eot_token, eot_token is None or isinstance(eot_token, int)),
    ):
        if not is_known:
            raise NotCoveredError(f"{what} is {value!r}, with which there is nothing to draw, or to stop at")
    length = given.shape[1]
    (reading,) = read_masks(attention_mask, 1, length)
    if not isinstance(reading, ImageFirst) or max(2, reading.end + 1) > length:
        raise NotCoveredError("the attention_mask is not that of an image, or features, and then text")
    # An image and the text after it, or text alone and its last token: two spans, and then the answer's.
    end, mode = (reading.end, reading.first) if reading.end else (length - 1, "causal")
    ids = [0] * length if by_embeddings else idx[0].tolist()
    tree = SpanTree.build([(ids[:end], -1, mode), (ids[end:], 0, "causal")], given.device)
    embeds = (torch.arange(length), input_embeddings[0]) if by_embeddings else None
    eot = transformer.config.vocab_size if eot_token is None else eot_token
    params = SamplingParams(temperature=float(temperature), top_k=top_k or 0, max_new_tokens=max_new_tokens)
    with torch.inference_mode():
        # There is one row, whose product with the head memory bounds; see SharedLinear.
        cache, head = transformer.new_cache(length + max_new_tokens), transformer.head
        sampler = AnswerSampler(transformer, cache, head, eot, backend=None, project=F.linear)
        rows = Answers.new(draw_seeds(1, None, given.device)[:, None], [params])
        tokens = _draw(acceleration.owner, sampler, tree, embeds, rows)
    if len(tokens) < max_new_tokens:
        tokens = [*tokens, eot]
    return list(torch.tensor(tokens, device=given.device).unbind())


def _draw(
    owner: nn.Module, sampler: AnswerSampler, prompt: SpanTree, embeds: Embeds | None, rows: Answers
) -> list[int]:
    """Tokens of the one answer, without eot, to the last span of a prompt."""
    device, limit = rows.seed.device, rows.tokens.shape[1] - 1
    last = torch.tensor([len(prompt.token_ids) - 1], device=device)
    sampler.draw(sampler.logits(sampler.transformer(prompt, sampler.cache, embeds, last)), rows)
    if rows.status.item() == GOES_ON:
        tree = prompt.extend([([0], prompt.num_spans - 1, "causal")], reserve=limit - 1)
        tree = tree.decode([prompt.num_spans], rows.last_token(), rows.length)
        step = DeviceGraph(functools.partial(sampler.advance, tree, rows), device)
        # On CUDA a look makes the device wait, and a step that comes to nothing costs less.
        steps_to_look = 1 if device.type == "cpu" else 8
        for number in range(1, limit):
            step()
            if number % steps_to_look == 0 and rows.status.item() != GOES_ON:
                break
    if rows.status.item() == FAILED:
        raise RuntimeError(
            f"mmu_generate: the model gives no distribution (NaN) at token {rows.length.item()}; {likely_cause(owner)}"
        )
    return rows.tokens[0, : rows.length.item()].tolist()


def _score_both(
    acceleration: _Acceleration,
    transformer: SharedTransformer,
    *,
    input_ids: Tensor,
    input_embeddings: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    batch_size_t2i: int,
    batch_size_mmu: int,
    max_seq_length: int,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """loss_for_unidpo: the sums of images and of captions, fp32 0-dim. batch_size_mmu 0 is all sequences."""
    found, sequences = _labels(labels)
    groups = [
        ScoredLabels(found, sequences[:batch_size_t2i], max_seq_length + 1, shift=0),
        ScoredLabels(found, sequences[-batch_size_mmu:], 1, shift=1),
    ]
    return tuple(_sums(acceleration, transformer, input_ids, input_embeddings, attention_mask, labels, groups))


def _score_images(
    acceleration: _Acceleration,
    transformer: SharedTransformer,
    *,
    input_ids: Tensor,
    input_embeddings: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    batch_size_t2i: int,
    max_seq_length: int,
    **_: Any,
) -> Tensor:
    """loss_for_dpo: the sum, fp32 0-dim."""
    found, sequences = _labels(labels)
    group = ScoredLabels(found, sequences[:batch_size_t2i], max_seq_length + 1, shift=0)
    return _sums(acceleration, transformer, input_ids, input_embeddings, attention_mask, labels, [group])[0]


def _score_captions(
    acceleration: _Acceleration,
    transformer: SharedTransformer,
    *,
    input_ids: Tensor,
    input_embeddings: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    **_: Any,
) -> Tensor:
    """loss_for_dpo_understanding: the sum over all sequences, fp32 0-dim."""
    found, sequences = _labels(labels)
    group = ScoredLabels(found, sequences, 1, shift=1)
    return _sums(acceleration, transformer, input_ids, input_embeddings, attention_mask, labels, [group])[0]


def _labels(labels: Tensor | None) -> tuple[np.ndarray, range]:
    """Labels on the host, and the numbers of their sequences."""
    if labels is None:
        raise NotCoveredError("there are no labels")
    return labels.long().cpu().numpy(), range(len(labels))


def _sums(
    acceleration: _Acceleration,
    transformer: SharedTransformer,
    input_ids: Tensor,
    input_embeddings: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor,
    groups: Sequence[ScoredLabels],
) -> list[Tensor]:
    """Each group's sum. Raises: NotCoveredError, UnknownMaskError."""
    shape = (input_ids if input_embeddings is None else input_embeddings).shape[:2]
    if labels.shape != shape:
        raise NotCoveredError(f"labels are {list(labels.shape)}, the sequences {list(shape)}")
    targets, positions = (np.concatenate([getattr(group, name) for group in groups]) for name in ("target", "position"))
    if not len(targets):
        raise NotCoveredError("no label is to be scored")
    size = transformer.config.vocab_size
    if not 0 <= targets.min() <= targets.max() < size or positions.min() < 0:
        raise NotCoveredError(f"labels lie outside of [0, {size}), or max_seq_length is negative")
    model = acceleration.owner.showo.model
    acceleration.free_images()
    is_checkpointed = bool(getattr(model, "gradient_checkpointing", False)) and model.training
    transformer.prepare_training(compiled=False, checkpointed=is_checkpointed)
    return logprob_sums(transformer, input_ids, input_embeddings, read_masks(attention_mask, *shape), groups)


_FAST: dict[str, Callable[..., Any]] = {
    "t2i_generate": _generate_images,
    "mmu_generate": _generate_text,
    "loss_for_unidpo": _score_both,
    "loss_for_dpo": _score_images,
    "loss_for_dpo_understanding": _score_captions,
}


def _problems(owner: nn.Module) -> list[str]:
    """What keeps a model from being an instance of the published class."""
    problems = [f"no method {name}" for name in METHODS[:2] if _definer(owner, name) is None]
    problems = problems or _method_problems(owner)
    for name in ("mask_token_id", "w_clip_vit"):
        if getattr(getattr(owner, "config", None), name, None) is None:
            problems.append(f"no .config.{name}")
    if not isinstance(getattr(owner, "showo", None), nn.Module):
        return [*problems, "no .showo"]
    return problems + _backbone_problems(owner)


def _method_problems(owner: nn.Module) -> list[str]:
    problems, kind = [], _definer(owner, METHODS[0])
    for name, expected in _PARAMETERS.items():
        if _definer(owner, name) is None:
            continue
        replaced = vars(owner).get(name)
        is_known = replaced is None or name == "forward" or isinstance(replaced, AcceleratedMethod)
        if _definer(owner, name) is not kind or not is_known:
            problems.append(f"{name} is not {kind.__name__ if kind else 'its class'}'s own")
        elif expected and (got := tuple(inspect.signature(getattr(type(owner), name)).parameters)[1:]) != expected:
            problems.append(f"{name} takes ({', '.join(got)}), not ({', '.join(expected)})")
    return problems


def _backbone_problems(owner: nn.Module) -> list[str]:
    problems = []
    try:
        config = _config(owner)
    except (InputError, AttributeError) as error:
        return [f".showo is no Phi ({error})"]
    scaling = getattr(owner.showo.config, "rope_scaling", None) or {}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        problems.append(f"rope_scaling {scaling} is not known")
    with torch.device("meta"):
        expected = showo.published_tensors(Transformer(config))
    for name, tensor in expected.items():
        path, _, attribute = name.rpartition(".")
        try:
            shape = tuple(getattr(owner.get_submodule(path), attribute).shape)
        except AttributeError:
            problems.append(f"no {name}")
            continue
        if shape != tuple(tensor.shape):
            problems.append(f"{name} is {shape}, not {tuple(tensor.shape)}")
    return problems


def _config(owner: nn.Module) -> TransformerConfig:
    return showo.transformer_config(owner.showo.config.to_dict(), owner.showo.model.embed_tokens.num_embeddings)


def _share(owner: nn.Module) -> SharedTransformer:
    """Our backbone over the model's modules."""
    config = _config(owner)
    modules = {}
    for name, published in showo.WEIGHTS.items():
        for layer in range(config.num_layers) if "*" in name else (0,):
            ours, *theirs = (path.replace("*", str(layer)) for path in (name, *published))
            modules[ours] = [owner.get_submodule(path) for path in theirs]
    return SharedTransformer(config, modules)


def _check_plain(owner: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Raises NotCoveredError where a module that ours stands in for does more than it was written to do."""
    for module in modules:
        rate = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0)
        if module.training and rate > 0:
            raise NotCoveredError("the model is in training mode with dropout; set it to 0, or call eval()")
    if any(map(is_hooked, modules)):
        raise NotCoveredError("a module of the language model has hooks or a forward of its own, which would not run")
    if type(owner.showo.lm_head) is not nn.Linear:
        raise NotCoveredError(f"lm_head is {type(owner.showo.lm_head).__name__}, no plain linear layer")
    weight = owner.showo.model.embed_tokens.weight
    if type(weight) is not nn.Parameter:
        raise NotCoveredError(f"the weights are {type(weight).__name__}, not whole on this device")
    if weight.dtype not in FLOAT_DTYPES:
        raise NotCoveredError(f"the weights are {weight.dtype}, not of 16 or 32 bits")


def _definer(owner: nn.Module, name: str) -> type | None:
    """The class that a method comes from."""
    return next((kind for kind in type(owner).__mro__ if name in vars(kind)), None)


def _unwrap(model: nn.Module, function: str) -> nn.Module:
    """The instance inside DistributedDataParallel (.module), torch.compile (._orig_mod), peft and the like."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{function}: expected a model of the published Showo class, got {type(model).__name__}; give the model "
            "that Showo.from_pretrained returns"
        )
    while not hasattr(type(model), METHODS[0]):
        inner = vars(model)["_modules"].get("module") or vars(model)["_modules"].get("_orig_mod")
        if inner is None and hasattr(type(model), "get_base_model"):
            inner = model.get_base_model()
        if inner is None:
            break
        model = inner
    return model
