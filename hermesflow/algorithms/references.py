"""The frozen reference of Pair-DPO: the policy's own weights before the first step.

Masks are pure functions of seed, pair and visit, so the reference's log-probabilities can be computed before training
begins and kept on the disk: no second copy of the weights, and a step without the reference's pass.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from hermesflow.algorithms.algorithm import Reference, batch_logprobs
from hermesflow.algorithms.batch import REPLAY, PairBatch, PairVisit
from hermesflow.algorithms.packing import PairPacker, referenced_sides
from hermesflow.algorithms.policy import Policy
from hermesflow.data.pairs import SIDES
from hermesflow.engine.transformer import Transformer
from hermesflow.runtime.distributed import barrier, gather, is_main, reshard
from hermesflow.runtime.files import InputError, ParquetRows, damaged, read_parquet, write_parquet
from hermesflow.runtime.progress import track

_SCHEMA = pa.schema(
    [("pair", pa.int32()), ("visit", pa.int32()), ("side", pa.string()), ("logprob", pa.list_(pa.float32()))]
)
_FINGERPRINT = b"hermesflow.fingerprint"


class LiveReference:
    """Computes beside each step, with a copy of the weights, or with the policy's own and its adapters off."""

    is_live = True

    def __init__(
        self, transformer: Transformer, without_adapters: Callable[[], AbstractContextManager] | None = None
    ) -> None:
        """
        Args:
            transformer: the policy before its first step.
            without_adapters: turns the policy's adapters off for a block; None: it has none, and is copied.
        """
        self._without_adapters = without_adapters or nullcontext
        self._transformer = transformer
        if without_adapters is None:
            self._transformer = copy.deepcopy(transformer).requires_grad_(False).eval()

    def logprobs(self, batch: PairBatch) -> Tensor:
        """fp32 [T]."""
        with torch.no_grad(), self._without_adapters():
            return batch_logprobs(self._transformer, batch)


class CachedReference:
    """Log-probabilities that were computed before the first step, from a file."""

    is_live = False

    def __init__(self, path: Path, table: pa.Table, sides: Collection[str], constant: Collection[str]) -> None:
        """
        Args:
            path: the file, for messages.
            table: what is in it.
            sides: those that need a reference; of others it gives zeros.
            constant: those that are the same at every visit; see PairPacker.
        """
        self._path, self._sides, self._constant = path, sides, constant
        keys = zip(*(table[name].to_pylist() for name in ("pair", "visit", "side")), strict=True)
        column = table["logprob"].combine_chunks()
        values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
        self._of = {key: values[offsets[row] : offsets[row + 1]] for row, key in enumerate(keys)}

    def logprobs(self, batch: PairBatch) -> Tensor:
        """fp32 [T]. Raises: InputError if the file lacks a pair of the batch."""
        try:
            found = [value for side in batch.sides for value in self._values_of(batch, side)]
        except KeyError as error:
            raise damaged(self._path, "reference", ValueError(f"it lacks pair, visit, side {error}")) from error
        values = torch.from_numpy(np.concatenate(found)).to(batch.tree.token_ids.device)
        if len(values) != len(batch.rows):
            raise damaged(self._path, "reference", ValueError(f"{len(values)} values for {len(batch.rows)} tokens"))
        return values

    def _values_of(self, batch: PairBatch, side: str) -> list[np.ndarray]:
        if side not in self._sides:
            return [np.zeros(len(batch.sides[side].rows), np.float32)]
        return [self._of[_key(visit, side, self._constant)] for visit in batch.visits_of[side]]


class NoReference:
    """Zeros, for a loss without a reference."""

    is_live = False

    def logprobs(self, batch: PairBatch) -> Tensor:
        """fp32 [T]."""
        return torch.zeros(len(batch.rows), device=batch.tree.token_ids.device)


def cached_reference(
    path: Path,
    made_from: Sequence[object],
    packer: PairPacker,
    visits: Sequence[PairVisit],
    logprobs: Callable[[PairBatch], Tensor],
) -> CachedReference:
    """Reads the reference's log-probabilities, or computes them and writes the file.

    Args:
        path: the file.
        made_from: what they depend on beside pairs, masks and visits, as JSON holds it: weights and dtype. A file that
            was made from something else is made again.
        packer: of the pairs.
        visits: all that training will ask for.
        logprobs: of a pass, with the weights that the run starts from.
    Returns: the reference.
    Raises: InputError if the file is damaged or cannot be written.
    """
    depends_on = json.dumps([made_from, packer.fingerprint(), visits])
    fingerprint = hashlib.blake2b(depends_on.encode(), digest_size=16).hexdigest().encode()
    if not _is_made(path, fingerprint):
        rows = [row for part in gather(list(_rows(packer, visits, logprobs))) for row in part]
        if is_main():
            rows.sort(key=lambda row: (row["pair"], row["visit"], row["side"]))
            table = pa.Table.from_pylist(rows, _SCHEMA)
            write_parquet(path, table.replace_schema_metadata({_FINGERPRINT: fingerprint}))
    barrier()
    table = read_parquet(path)
    try:
        table = table.cast(_SCHEMA.with_metadata(table.schema.metadata))
        return CachedReference(path, table, referenced_sides(packer.config), packer.constant_sides)
    except (pa.ArrowException, ValueError) as error:
        raise damaged(path, "reference", error) from error


def make_reference(policy: Policy, packer: PairPacker, visits: Sequence[PairVisit], path: Path) -> Reference:
    """The reference of these visits, as the settings say; the policy still has its first weights.

    Args:
        policy: gives the log-probabilities, or is copied, unless it names the first model as its reference.
        packer: of the pairs.
        visits: all that training will ask for.
        path: where a cached one is kept.
    Raises: InputError if a live reference would need a copy of sharded weights, or as cached_reference does.
    """
    config, transformer = packer.config, policy.first or policy.transformer
    if not referenced_sides(config) or not visits:
        return NoReference()
    if config.reference == "live":
        return live_reference(policy)

    def logprobs(batch):
        # Inference-mode tensors cannot be used in autograd, and sharded weights are kept between passes.
        with torch.no_grad() if policy.is_sharded else torch.inference_mode():
            return batch_logprobs(transformer, batch)

    reference = cached_reference(path, [policy.digest, str(policy.work.dtype)], packer, visits, logprobs)
    reshard(transformer)
    return reference


def live_reference(policy: Policy) -> LiveReference:
    """The reference's weights beside the policy. Raises: InputError if that would need a copy of sharded weights."""
    if policy.first is not None:
        return LiveReference(policy.first, nullcontext)
    if policy.is_sharded and policy.adapters is None:
        raise InputError(
            "train.reference live: a sharded model has no second copy; take cached, or adapters (train.lora_rank)"
        )
    return LiveReference(policy.transformer, policy.adapters and policy.adapters.off)


def _is_made(path: Path, fingerprint: bytes) -> bool:
    made = path.exists() and (ParquetRows(path).schema.metadata or {}).get(_FINGERPRINT) == fingerprint
    return all(gather(made))


def _rows(packer: PairPacker, visits: Sequence[PairVisit], logprobs: Callable[[PairBatch], Tensor]) -> Iterator[dict]:
    """The rows of this process's passes; after a pair's first visit they are of what differs by visit (_key)."""
    device = packer.model.transformer.embed.weight.device
    packer = packer.only(*referenced_sides(packer.config))
    differing = packer.only(*(side for side in (*SIDES, REPLAY) if side not in packer.constant_sides))
    first: dict[int, PairVisit] = {}
    for visit in visits:
        first.setdefault(visit.pair, visit)
    later = [visit for visit in visits if visit != first[visit.pair]]
    work = [
        (chosen, planned)
        for chosen, asked in ((packer, first.values()), (differing, later))
        for planned in chosen.passes([visit for visit in asked if chosen.num_tokens(visit)])
    ]
    for part, (chosen, counts) in track(work, "reference", "passes"):
        batch = part.pack(chosen, device)
        by_side = batch.split(logprobs(batch).cpu())
        for side, values in by_side.items() if counts else ():
            num_tokens = batch.num_tokens_of[side]
            for visit, logprob in zip(batch.visits_of[side], values.split(num_tokens), strict=True):
                pair, number, _ = _key(visit, side, packer.constant_sides)
                yield {"pair": pair, "visit": number, "side": side, "logprob": logprob.numpy()}


def _key(visit: PairVisit, side: str, constant: Collection[str]) -> tuple[int, int, str]:
    """Of a row; sides that are the same at every visit have one alone."""
    return visit.pair, 0 if side in constant else visit.visit, side
