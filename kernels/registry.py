"""Which backend runs an op.

A backend is registered with the function that implements it and with can_run, which is given the op's arguments and
returns None or the reason why it cannot run them. The order of registration is the order of preference. Modules load on
first use. A named backend runs or raises; only None falls through to the next.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, NamedTuple

import torch

from hermesflow.kernels import OPS, checks

ENVIRONMENT_VARIABLE = "HERMESFLOW_BACKEND"

# Why a backend of this name can run nothing at all on this machine, or None. Other names need nothing but torch.
ENVIRONMENT_CHECKS: dict[str, Callable[[], str | None]] = {
    "cuda": checks.cuda_missing,
    "cpu": checks.cpu_missing,
    "triton": checks.triton_missing,
    "flash_attn": checks.flash_attn_missing,
    "xformers": checks.xformers_missing,
}


class BackendError(RuntimeError):
    """The backend that was asked for does not exist or cannot run these arguments."""


class Backend(NamedTuple):
    target: str
    can_run: Callable[..., str | None]


_registered: dict[str, dict[str, Backend]] = {}
_loaded: dict[str, Callable[..., Any]] = {}


def register(op: str, backend: str, target: str, can_run: Callable[..., str | None]) -> None:
    """Add a backend of an op; target is "module:function", can_run(*args, **kwargs) gives None or a reason."""
    _registered.setdefault(op, {})[backend] = Backend(target, can_run)


def dispatch(op: str, backend: str | None, *args: Any, **kwargs: Any) -> Any:
    """Run op on the named backend, else on the one HERMESFLOW_BACKEND names, else on the first that can run.

    Raises: BackendError with the reason if the named backend, or every backend, cannot run these arguments.
    """
    name = backend or _from_environment(op)
    names = _registered[op] if name is None else (name,)
    reasons = []
    for candidate in names:
        reason = _refusal(op, candidate, args, kwargs)
        if reason is None:
            _load(_registered[op][candidate].target)
            with _on_device_of(args):
                return _loaded[_registered[op][candidate].target](*args, **kwargs)
        reasons.append(f"{candidate}: {reason}")
    what = f"no backend of {op} can run these arguments" if name is None else f"{op} cannot run on backend {name!r}"
    raise BackendError(f"{what} ({'; '.join(reasons)})")


def _on_device_of(args: tuple) -> AbstractContextManager:
    """Makes the GPU of the first tensor the current one, where Triton launches its kernels."""
    device = args[0].device if isinstance(args[0], torch.Tensor) else None
    return torch.cuda.device(device) if device is not None and device.type == "cuda" else nullcontext()


def explain(op: str, *args: Any, **kwargs: Any) -> list[tuple[str, str | None]]:
    """For each backend of op, in order of preference: its name and None, or why it cannot run these arguments."""
    return [(name, _refusal(op, name, args, kwargs)) for name in _registered[op]]


def backends() -> dict[str, dict[str, str | None]]:
    """op -> backend -> None, or why that backend can run nothing on this machine."""
    for op in OPS:
        import_module(f"hermesflow.kernels.{op}")
    return {op: {name: _environment_refusal(name) for name in _registered[op]} for op in OPS}


def _refusal(op: str, name: str, args: tuple, kwargs: dict) -> str | None:
    if name not in _registered[op]:
        return f"{op} has the backends {', '.join(_registered[op])}"
    return _environment_refusal(name) or _registered[op][name].can_run(*args, **kwargs)


# torch.compile takes what these three return at trace time as constants, so that it can trace through the choice.
@torch.compiler.assume_constant_result
def _environment_refusal(name: str) -> str | None:
    check = ENVIRONMENT_CHECKS.get(name)
    return check() if check else None


@torch.compiler.assume_constant_result
def _from_environment(op: str) -> str | None:
    """HERMESFLOW_BACKEND is a backend's name, or "op=backend,op=backend" to speak of those ops only."""
    value = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
    if "=" not in value:
        return value or None
    choices: dict[str, str] = {}
    for choice in filter(None, (part.strip() for part in value.split(","))):
        name, separator, backend = (piece.strip() for piece in choice.partition("="))
        if not separator or name not in OPS or not backend:
            raise BackendError(
                f"{ENVIRONMENT_VARIABLE}: expected a backend or op=backend,op=backend with ops among {', '.join(OPS)}, "
                f"got {choice!r}"
            )
        choices[name] = backend
    return choices.get(op)


@torch.compiler.assume_constant_result
def _load(target: str) -> None:
    if target not in _loaded:
        module, function = target.split(":")
        _loaded[target] = getattr(import_module(module), function)
