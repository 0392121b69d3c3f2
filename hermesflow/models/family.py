"""The seam of model families: what a file of models/ gives, and how a checkpoint finds its file.

A family is one file with an object of the class below, and one line in FAMILIES of runtime/registry.py.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from hermesflow.config import ModelConfig
from hermesflow.models.hub import find_folder
from hermesflow.models.model import Model
from hermesflow.runtime.distributed import local_device
from hermesflow.runtime.files import InputError, StrPath, expand_home, read_json, reason_of, shown
from hermesflow.runtime.registry import FAMILIES, resolve

ASSETS = Path(__file__).parents[1] / "assets"
CONFIG = "config.json"


class Family(Protocol):
    """One kind of checkpoint."""

    files: tuple[str, ...]
    """Patterns of the files that are fetched from the hub, no code among them."""
    markers: tuple[str, ...] = (CONFIG,)
    """Files of JSON by which a checkpoint is known, the preferred first; may be left out."""

    def claims(self, config: Any) -> bool:
        """Whether a checkpoint whose first marker holds this, whatever JSON it is, is of the family."""

    def load(
        self,
        folder: Path,
        config: Mapping[str, Any],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        **options: Any,
    ) -> Model:
        """Opens a checkpoint, whose save writes the same layout.

        Args:
            folder: of the checkpoint.
            config: what its first marker holds, such as its config.json.
            device: where the weights go; None is the CPU.
            dtype: of the backbone; None takes the checkpoint's.
            options: of load_model, those that are given.
        Raises: InputError on a file that is missing, damaged or does not fit the others.
        """


def open_model(config: ModelConfig) -> Model:
    """The model of a run's settings, where and in the dtype that they say. Raises: InputError as load_model does."""
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    model = load_model(config.name, local_device(config.device), dtype, family=config.family)
    if config.image_size:
        try:
            model.set_image_size(config.image_size)
        except ValueError as error:
            raise InputError(f"model.image_size {config.image_size}: {error}") from error
    try:
        model.answer_masks = config.answer_masks
    except ValueError as error:
        raise InputError(f"model.answer_masks: {error}") from error
    return model


def load_model(
    name_or_path: StrPath = "tiny",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    vq_tokenizer: StrPath | None = None,
    family: str = "auto",
) -> Model:
    """Opens a built-in model, a folder that Model.save wrote, or a published checkpoint.

    Args:
        name_or_path: "tiny", "tiny-ar" or "tiny-flow", a folder, or a hub id such as "showlab/show-o-512x512" or
            "Gen-Verse/HermesFlow".
        device: where the weights go; None is the CPU.
        dtype: of the backbone; None takes the checkpoint's, and fp32 for the built-in model's folders.
        vq_tokenizer: for published checkpoints: folder or hub id of the image tokenizer; None takes the one beside the
            checkpoint (magvitv2/), else the family's own. It is opened when it is first needed.
        family: a name of FAMILIES or "module:object" of your own; "auto" finds it by config.json.
    Raises:
        InputError: no such model, the hub cannot be reached, or a file of it is missing, damaged or does not fit the
            others; what does not fit is listed.
    """
    name_or_path = expand_home(os.fspath(name_or_path))
    names = list(FAMILIES) if family == "auto" else [family]
    families = {name: resolve(FAMILIES, name, "model.family", ("files", "claims", "load")) for name in names}
    markers_of = {name: getattr(item, "markers", (CONFIG,)) for name, item in families.items()}
    folder, marker = _find(name_or_path, tuple(dict.fromkeys((CONFIG, *itertools.chain(*markers_of.values())))))
    config = read_json(folder / marker)
    options = {} if vq_tokenizer is None else {"vq_tokenizer": expand_home(os.fspath(vq_tokenizer))}
    if family == "auto":
        families = {name: item for name, item in families.items() if marker in markers_of[name] and item.claims(config)}
        if not families:
            known = config if isinstance(config, Mapping) else {}
            named = {name: known[name] for name in ("_class_name", "model_type", "architectures") if name in known}
            given = ", ".join(f"{name} {shown(value)}" for name, value in named.items()) or "no family"
            raise InputError(
                f"{folder / marker}: unknown {given}; known: {', '.join(FAMILIES)}; restore it from its source, or set "
                "model.family (--family)"
            )
    found = next(iter(families.values()))
    if family in FAMILIES and not (marker in markers_of[family] and found.claims(config)):
        raise InputError(f"{folder / marker}: is no checkpoint of the family {family}; set model.family to auto")
    if folder != ASSETS / name_or_path:
        folder = find_folder(name_or_path, found.files, "model")  # of a hub's repository the rest
    if ":" not in family:
        return found.load(folder, config, device, dtype, **options)
    try:
        model = found.load(folder, config, device, dtype, **options)
        if not isinstance(model, Model):
            raise TypeError(f"load gave {shown(model)}, no Model")
        _ = model.engine  # what does not fit together in its layout shows here
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # code of the user's may raise anything
        raise InputError(
            f"model.family {family}: {folder} cannot be opened ({type(error).__name__}: {reason_of(error)}); correct "
            "it (HERMESFLOW_DEBUG=1 shows where)"
        ) from error
    return model


def trained_rounds(run_folder: StrPath) -> list[Path]:
    """The models of a run's rounds, in their order; none where the folder holds no run."""
    rounds = Path(run_folder).glob("round-*/model")
    return sorted(rounds, key=lambda path: int(path.parent.name.removeprefix("round-")))


def _find(name: str, markers: tuple[str, ...]) -> tuple[Path, str]:
    """The folder of a model, and the first of the markers that it holds."""
    is_name = name == Path(name).name  # "./tiny" is a folder of the user's
    folder = ASSETS / name if is_name and os.path.isfile(ASSETS / name / CONFIG) else None
    if folder is None and ("/" in name or os.path.isdir(name)):
        folder = find_folder(name, markers, "model")
    marker = next((marker for marker in markers if folder and (folder / marker).is_file()), None)
    if marker is None:
        rounds = trained_rounds(name) if os.path.isdir(name) else []
        if rounds:
            raise InputError(f"{name}: is the folder of a run; give the model of a round, such as {rounds[-1]}")
        raise InputError(
            f"no model {name!r}: give 'tiny', 'tiny-ar' or 'tiny-flow', a folder that holds config.json, or a hub id "
            "such as showlab/show-o-512x512"
        )
    return folder, marker
