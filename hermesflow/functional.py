"""hermesflow.functional, which lives in hermesflow/drop_in/functional.py."""

from hermesflow.drop_in.functional import (
    dpo_loss,
    draw_seeds,
    gumbel_sample,
    mask_by_random_topk,
    selective_log_softmax,
)

__all__ = ["dpo_loss", "draw_seeds", "gumbel_sample", "mask_by_random_topk", "selective_log_softmax"]
