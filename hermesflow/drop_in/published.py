"""What accelerate knows of a published class, and what its fast methods share; showo.py and mmada.py say the rest."""

from __future__ import annotations

import inspect
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hermesflow.drop_in.attention_masks import UnknownMaskError
from hermesflow.drop_in.functional import draw_seeds
from hermesflow.engine.decoders.masked import ImageDecoder, ImageSamplingParams
from hermesflow.engine.engine import Engine
from hermesflow.engine.nan_cause import likely_cause
from hermesflow.engine.shared_transformer import SharedTransformer, has_hooks, is_hooked
from hermesflow.engine.token_layout import Layout
from hermesflow.engine.transformer import Transformer, TransformerConfig
from hermesflow.kernels.checks import FLOAT_DTYPES
from hermesflow.models import loading
from hermesflow.runtime.files import InputError

_HOTTEST = 4.0
"""Temperature of the first step from which on noise may come near the confidence 88.7 that the originals give to known
tokens: a Gumbel beyond 15 has a chance of 3e-7."""

logger = logging.getLogger("hermesflow.drop_in")


class NotCoveredError(Exception):
    """A call that only the original method answers; the message says why."""


@dataclass(frozen=True, kw_only=True)
class PublishedClass:
    """A published class by data.

    name: of the class. marks: what an instance is known by, for messages. body: path of the language model in it.
    fast: name of a method -> the function in its place, called with the Acceleration, the transformer and the method's
    arguments by name; the first two must be there. parameters: of these methods, as published. settings: names that
    .config must have. weights, config: our backbone's weight table, and its shape, which raises InputError or
    AttributeError where the instance has another one.
    """

    name: str
    marks: str
    body: str
    fast: Mapping[str, Callable[..., Any]]
    parameters: Mapping[str, Sequence[str]]
    settings: Sequence[str] = ()
    weights: loading.WeightTable
    config: Callable[[nn.Module], TransformerConfig]

    def body_of(self, owner: nn.Module) -> nn.Module | None:
        """The language model of an instance; None where it has none."""
        try:
            return owner.get_submodule(self.body)
        except AttributeError:
            return None

    def problems(self, owner: nn.Module) -> list[str]:
        """What keeps a model from being an instance of the class."""
        problems = [f"no method {name}" for name in list(self.fast)[:2] if definer(owner, name) is None]
        problems = problems or self._method_problems(owner)
        config = getattr(owner, "config", None)
        problems += [f"no .config.{name}" for name in self.settings if getattr(config, name, None) is None]
        if self.body_of(owner) is None:
            return [*problems, f"no .{self.body}"]
        return problems + self._backbone_problems(owner)

    def _method_problems(self, owner: nn.Module) -> list[str]:
        kind = definer(owner, next(iter(self.fast)))
        problems = []
        for name in ("forward", *self.fast):
            found = definer(owner, name)
            if found is None:
                continue
            replaced = vars(owner).get(name)
            is_known = replaced is None or name == "forward" or isinstance(replaced, AcceleratedMethod)
            is_inherited = name == "forward" and found in kind.__mro__
            if not is_known or (found is not kind and not is_inherited):
                problems.append(f"{name} is not {kind.__name__}'s own")
            elif name != "forward":
                got = tuple(inspect.signature(getattr(type(owner), name)).parameters)[1:]
                if got != tuple(self.parameters[name]):
                    problems.append(f"{name} takes ({', '.join(got)}), not ({', '.join(self.parameters[name])})")
        return problems

    def _backbone_problems(self, owner: nn.Module) -> list[str]:
        try:
            config = self.config(owner)
        except (InputError, AttributeError) as error:
            return [f".{self.body} is another language model ({error})"]
        problems = []
        with torch.device("meta"):
            expected = loading.published_tensors(self.weights, Transformer(config))
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

    def share(self, owner: nn.Module) -> SharedTransformer:
        """Our backbone over the model's modules."""
        config = self.config(owner)
        modules = {}
        for name, published in self.weights.items():
            for layer in range(config.num_layers) if "*" in name else (0,):
                ours, *theirs = (path.replace("*", str(layer)) for path in (name, *published))
                modules[ours] = [owner.get_submodule(path) for path in theirs]
        return SharedTransformer(config, modules)

    def check_plain(self, owner: nn.Module, modules: Sequence[nn.Module]) -> None:
        """Raises NotCoveredError where a module that ours stands in for does more than it was written to do."""
        for module in modules:
            config = getattr(module, "config", None)
            rate = max(
                module.p if isinstance(module, nn.Dropout) else 0,
                *(getattr(each, "attention_dropout", None) or 0 for each in (module, config)),
            )
            if module.training and rate > 0:
                raise NotCoveredError("the model is in training mode with dropout; set it to 0, or call eval()")
        if any(map(is_hooked, modules)):
            raise NotCoveredError(
                "a module of the language model has hooks or a forward of its own, which would not run"
            )
        head, embed = (owner.get_submodule(self.weights[name][0]) for name in ("head", "embed"))
        if type(head) is not nn.Linear:
            name = self.weights["head"][0].rpartition(".")[2]
            raise NotCoveredError(f"{name} is {type(head).__name__}, no plain linear layer")
        if type(embed.weight) is not nn.Parameter:
            raise NotCoveredError(f"the weights are {type(embed.weight).__name__}, not whole on this device")
        if embed.weight.dtype not in FLOAT_DTYPES:
            raise NotCoveredError(f"the weights are {embed.weight.dtype}, not of 16 or 32 bits")


class Acceleration:
    """What the methods of one model share; built when it is first needed, and again when modules were replaced."""

    kind: PublishedClass

    def __init__(self, owner: nn.Module) -> None:
        """
        Args:
            owner: the model.
        """
        self.owner = owner
        self._warned: set[tuple[str, str]] = set()
        self._built_from: list[nn.Module] = []
        self._transformer: SharedTransformer | None = None
        self._engine: Engine | None = None

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
                return self.kind.fast[name](self, transformer, **arguments)
        except UnknownMaskError as error:
            raise NotCoveredError(str(error)) from error

    def transformer(self) -> SharedTransformer:
        """Over the model's modules of now. Raises: NotCoveredError where they do more than ours would."""
        body = self.kind.body_of(self.owner)
        modules = [] if body is None else list(body.modules())
        if self._transformer is None or modules != self._built_from:
            problems = self.kind.problems(self.owner)
            if problems:
                raise NotCoveredError(f"the model has changed: {'; '.join(problems)}")
            self._transformer, self._engine, self._built_from = self.kind.share(self.owner), None, modules
        self.kind.check_plain(self.owner, modules)
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

    def engine(self, layout: Layout, **decoders: type) -> Engine:
        """Kept from call to call, since on CUDA it keeps graphs."""
        if self._engine is None or self._engine.layout != layout:
            self._engine = Engine(self._transformer, layout, **decoders)
        return self._engine

    def draw_images(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        unguided: Sequence[Sequence[int]],
        image_ids: Tensor,
        *,
        temperature: float,
        timesteps: int,
        guidance_scale: float,
        noise_schedule: Callable[[Tensor], Tensor],
        generator: torch.Generator | None,
    ) -> Tensor:
        """t2i_generate by the engine of a layout whose text_prompt is the identity.

        Args:
            engine: from engine().
            prompts: what stands before each of B images.
            unguided: the same of their unconditional halves; empty without guidance.
            image_ids: int64 [B, N], codes of the joint vocabulary and masks.
            temperature, timesteps, guidance_scale, noise_schedule, generator: the caller's.
        Returns: codes int64 [B, N].
        Raises: NotCoveredError; RuntimeError if the logits hold NaN.
        """
        transformer, layout = self._transformer, engine.layout
        known = torch.where(image_ids == layout.mask_id, -1, image_ids - layout.code_ids[0])
        is_code = (known >= 0) & (known < layout.codebook_size)
        if not (is_code | (image_ids == layout.mask_id)).all():
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
        params = covered(
            ImageSamplingParams,
            num_steps=timesteps,
            guidance_scale=float(guidance_scale) if unguided else 0.0,
            mask_temperature=float(temperature),
            schedule=tuple(ratios),
            mask_decay="showo",
        )
        # Copies of weights in autocast's dtype end with this call, and adapters may change; a kept graph would not see
        # it.
        is_kept = transformer.precision.dtype is None and transformer.has_plain_layers
        decoder = engine.image_decoder if is_kept else ImageDecoder(transformer, layout)
        seeds = draw_seeds(len(prompts), generator, image_ids.device)
        with self.explained_nan("t2i_generate"), torch.inference_mode():
            codes = decoder.generate(
                prompts,
                seeds[:, None],
                params,
                unguided_ids=unguided or None,
                known_codes=known,
                max_sequences=engine.max_sequences,
            )
        return codes[:, 0].clone()  # a tensor made in inference mode cannot be used in training

    @contextmanager
    def explained_nan(self, method: str) -> Iterator[None]:
        """For a block: a decoder's error about NaN names the method, and the weights by their published names."""
        try:
            yield
        except RuntimeError as error:
            if "no distribution" not in str(error):
                raise
            where = str(error).partition(": ")[2].rpartition("; ")[0]
            raise RuntimeError(f"{method}: {where}; {likely_cause(self.owner)}") from error


class AcceleratedMethod:
    """What stands in place of a method; it is copied and pickled together with its model."""

    def __init__(self, acceleration: Acceleration, name: str) -> None:
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


def covered(kind: type, **values: Any) -> Any:
    """Settings of a decoder. Raises: NotCoveredError where they are none of its own."""
    try:
        return kind(**values)
    except ValueError as error:
        raise NotCoveredError(str(error)) from error


def check_text_settings(settings: Sequence[tuple[str, Any, bool]]) -> None:
    """Raises NotCoveredError on the first of (name, value, whether there is something to draw with it) that has not."""
    for name, value, is_known in settings:
        if not is_known:
            raise NotCoveredError(f"{name} is {value!r}, with which there is nothing to draw, or to stop at")


def is_number(value: Any) -> bool:
    """Whether a value is finite and at least 0."""
    return isinstance(value, (int, float)) and 0 <= value < math.inf


def definer(owner: nn.Module, name: str) -> type | None:
    """The class that a method comes from."""
    return next((kind for kind in type(owner).__mro__ if name in vars(kind)), None)
