"""The packer for a model's layout."""

from __future__ import annotations

import pyarrow as pa

from hermesflow.algorithms.bidirectional_packing import BidirectionalPacker
from hermesflow.algorithms.feature_packing import FeaturePacker
from hermesflow.algorithms.latent_packing import LatentPacker
from hermesflow.algorithms.packing import PairPacker
from hermesflow.config import TrainConfig
from hermesflow.models.model import Model


def make_packer(model: Model, pairs: pa.Table, config: TrainConfig, seed: int) -> PairPacker:
    """Arguments are PairPacker's."""
    layout, kind = model.layout, PairPacker
    if layout.latent_size:
        kind = LatentPacker if layout.image_mode == "full" else FeaturePacker
    elif layout.is_bidirectional:
        kind = BidirectionalPacker
    return kind(model, pairs, config, seed)
