"""The ops: one file an op (public function, checks, torch reference) and a registry of backends.

Import an op from its file, `from hermesflow.kernels.guided_sample import guided_sample`: a package attribute of the
same name would be the function once and the module after the next import.
"""

if __name__ != "hermesflow.kernels":
    raise ImportError(
        "hermesflow's folder kernels/ was imported as the top-level package 'kernels'; import hermesflow.kernels "
        "instead, and set PYTHONSAFEPATH=1 (or leave the repository root) when running python -m or python -c."
    )

OPS = (
    "span_attention",
    "guided_sample",
    "linear_sample",
    "mask_topk",
    "token_sample",
    "token_logprob",
    "linear_logprob",
    "pair_dpo",
)
LOSS_TYPES = {"sigmoid": True, "ipo": False, "hinge": False, "robust": True}
"""Forms of pair_dpo's loss, in the order in which kernels number them (csrc/pair_dpo.h), and whether label_smoothing
has a meaning for them. Here, so that settings can be read without torch."""
