"""Weights on disk: safetensors out; safetensors or .bin in, sharded or not, and one error that lists what does not fit.

Files are mapped and copied in pieces, whose pages are then given back, so that loading needs little more memory than
the weights themselves.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import pickle
import pickletools
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

WEIGHT_FILES = tuple(
    f"{stem}.{kind}{index}"
    for kind in ("safetensors", "bin")
    for index in (".index.json", "")
    for stem in ("model", "pytorch_model", "diffusion_pytorch_model")
)
"""Names under which a folder may hold its weights, the preferred first: those of transformers, diffusers and Show-o."""

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What weights may be; narrower ones mean nothing without scales of their own."""

Views = Callable[[nn.Module], dict[str, Tensor]]
"""Of a module: the name of each tensor on disk -> the parameter, or the part of one, that it is."""

_PIECE_BYTES = 16 << 20
_LONGEST_NAME = 4096


def save_weights(module: nn.Module, path: Path, dtype: torch.dtype | None = None) -> None:
    """Writes a module's state dict as safetensors; dtype converts floating-point tensors (None keeps theirs)."""
    save_tensors(module.state_dict(), path, dtype)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None = None) -> None:
    """Writes named tensors; dtype converts floating-point ones (None keeps theirs).

    As safetensors, or in PyTorch's form where the path ends in .bin, .pt, .pth or .ckpt, in the last under state_dict.
    """
    tensors = {name: _converted(tensor, dtype) for name, tensor in tensors.items()}
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        # What torch.save is given a part of it writes as a whole.
        own = {
            name: tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
            for name, tensor in tensors.items()
        }
        torch.save({"state_dict": own} if path.suffix == ".ckpt" else own, path)
        return
    save_file(tensors, path, metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    Path(path).chmod(0o666 & ~umask)  # safetensors writes for the owner alone


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The views of a module whose weights lie on disk under its own names."""
    return {name: tensor.detach() for name, tensor in module.state_dict(keep_vars=True).items()}


def load_weights(
    module: nn.Module,
    path: Path,
    views: Views = own_tensors,
    *,
    ignored: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Fills a module from a file or a folder of weights.

    Args:
        module: what to fill; one on the meta device is allocated once the file is known to fit.
        path: a .safetensors or .bin file, a .ckpt with a state_dict, or a folder that holds one of WEIGHT_FILES.
        views: which tensor on disk is which part of the module.
        ignored: regular expression of whole names that the file may have besides (buffers of old versions).
        dtype, device: of a module on the meta device; None takes the dtype of the file's first tensor, and the CPU. Any
            other module keeps its own.
    Raises:
        ValueError: the file is missing, damaged or holds anything but tensors; or keys are missing, unexpected or
            misshapen (all are listed); or a tensor holds NaN or infinity in the module's dtype.
    """
    found, parts = read_tensors(path), views(module)
    _check_fit(path, found, parts, ignored)
    if any(part.is_meta for part in parts.values()):
        first = found[next(iter(parts))]
        _allocate(module.to(dtype=dtype or first.dtype), device or "cpu")
        parts = views(module)
    uses = Counter(tensor.untyped_storage().data_ptr() for tensor in found.values())
    for name, part in parts.items():
        source = found.pop(name)
        if not _copy(source, part, used_once=uses[source.untyped_storage().data_ptr()] == 1):
            raise ValueError(f"{path}: {name} holds NaN or infinity; restore it from its source")


def _allocate(module: nn.Module, device: torch.device | str) -> None:
    """As to_empty, but a parameter that stands in two places stays one."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            places.setdefault(parameter, []).append((owner, name))
    module.to_empty(device=device)
    for first, *others in places.values():
        for owner, name in others:
            setattr(owner, name, getattr(*first))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, or of a folder that holds one of WEIGHT_FILES, mapped from disk rather than read.

    Raises: ValueError if there are none, a file is damaged or no tensors, a shard is missing, or a name occurs twice.
    """
    tensors: dict[str, Tensor] = {}
    for file in _files(path):
        for name, tensor in _open(file):
            if name in tensors:
                raise ValueError(f"{file}: {name} stands in another shard too; restore the folder from its source")
            tensors[name] = tensor
    return tensors


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"{path}: no such file; restore it from its source")
        return [path]
    name = next((name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if name is None:
        raise ValueError(f"{path}: holds no weights, none of {', '.join(WEIGHT_FILES)}; restore it from its source")
    if not name.endswith(".index.json"):
        return [path / name]
    index = path / name
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = [index.parent / _plain_name(shard) for shard in shards]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: not an index of shards ({error!r:.200}); restore it from its source") from error
    missing = [shard.name for shard in shards if not os.path.isfile(shard)]  # no error on a name too long
    if missing or not shards:
        raise ValueError(f"{index}: shards are missing ({', '.join(missing) or 'all'}); fetch them")
    return shards


def _plain_name(name: str) -> str:
    if not isinstance(name, str) or not name or Path(name).name != name or name.startswith("."):
        raise ValueError(f"{name!r} is not the name of a file in this folder")
    return name


def _open(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and mapped tensors of one file; a .bin is unpickled without running code."""
    try:
        if file.name.endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                yield from ((name, opened.get_tensor(name)) for name in opened.keys())
            return
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):  # they may unpack to any size
            raise ValueError("its entries are compressed")
        _check_names(torch._C.PyTorchFileReader(os.fspath(file)).get_record("data.pkl"))
        state = torch.load(file, mmap=True, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file}: holds more than tensors, and code in it is not run; give the weights as safetensors"
        ) from error
    except Exception as error:  # torch.load and safetensors raise many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        kind = "safetensors" if file.name.endswith(".safetensors") else "PyTorch weights"
        raise ValueError(f"{file}: not a readable {kind} file ({reason}); restore it from its source") from error
    if file.name.endswith(".ckpt") and isinstance(state, dict):  # Lightning's form
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{file}: holds a {type(state).__name__}, not named tensors; give a state dict")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ValueError(f"{file}: {name} is no plain tensor; give a file that holds weights alone")
    # torch.load maps what the pickle asks for, be an entry of the archive shorter or not.
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in state.values()}
    stored = sum(entry.file_size for entry in entries if re.fullmatch(r"[^/]*/data/\d+", entry.filename))
    if sum(storages.values()) != stored:
        raise ValueError(
            f"{file}: holds {stored} bytes of tensors, not {sum(storages.values())}; restore it from its source"
        )
    yield from state.items()


def _check_names(pickled: bytes) -> None:
    """Raises: ValueError on an endless text: where torch.load refuses a pickle that holds one, it words the reason in
    the square of its length."""
    if any(isinstance(text, str | bytes) and len(text) > _LONGEST_NAME for _, text, _ in pickletools.genops(pickled)):
        raise ValueError(f"a name has more than {_LONGEST_NAME} characters")


def _check_fit(path: Path, found: Mapping[str, Tensor], parts: Mapping[str, Tensor], ignored: str | None) -> None:
    problems = [f"missing {name}" for name in parts if name not in found]
    for name, tensor in found.items():
        if name not in parts:
            if not (ignored and re.fullmatch(ignored, name)):
                problems.append(f"unexpected {name}")
        elif tensor.shape != parts[name].shape:
            problems.append(f"{name}: expected {tuple(parts[name].shape)}, got {tuple(tensor.shape)}")
        elif not parts[name].is_floating_point():  # a buffer that counts
            if tensor.dtype != parts[name].dtype:
                problems.append(f"{name}: expected {parts[name].dtype}, got {tensor.dtype}")
        elif tensor.dtype not in WEIGHT_DTYPES:
            problems.append(f"{name}: expected floating point of 16 bits or more, got {tensor.dtype}")
    if problems:
        listed = "; ".join(problems)
        raise ValueError(f"{path} does not fit the configuration: {listed}; restore both from their source")


def _copy(source: Tensor, target: Tensor, used_once: bool) -> bool:
    """Copies piece by piece, gives back the pages of a source used once; False where target holds NaN or infinity."""
    size = max(1, _PIECE_BYTES // max(source.element_size(), target.element_size()))
    finite = True
    for piece, place in zip(source.reshape(-1).split(size), target.view(-1).split(size), strict=True):
        converted = piece.to(target.dtype)
        finite = finite and bool(converted.isfinite().all())
        place.copy_(converted)
        if used_once:
            _release(piece)
    return finite


def _release(done: Tensor) -> None:
    """Gives a tensor's whole pages back to the system; it must not be read again: what is not mapped would be zeros."""
    page = mmap.PAGESIZE
    start = -(-done.data_ptr() // page) * page
    length = (done.data_ptr() + done.nbytes) // page * page - start
    if length > 0:
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


_LIBC = ctypes.CDLL(None)


def _converted(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor).contiguous()
