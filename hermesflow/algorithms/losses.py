"""Forms of the preference loss: those of the op pair_dpo, SimPO, and one's own."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hermesflow.algorithms.batch import Side
from hermesflow.config import TrainConfig
from hermesflow.kernels import LOSS_TYPES
from hermesflow.kernels.pair_dpo import PairDPOOutput, pair_dpo
from hermesflow.runtime.files import InputError
from hermesflow.runtime.registry import LOSSES, resolve


class PairLoss:
    """A form of the preference loss. One of your own says what a pair loses; see docs/extending.md."""

    needs_reference = True
    """Whether it compares the policy with the reference."""
    means_over_tokens = False
    """Whether the log-probability of an image or caption is always the mean over its tokens, not their sum."""
    smooths_labels = False
    """Whether train.label_smoothing has a meaning."""

    def of_pairs(self, win: Tensor, lose: Tensor, config: TrainConfig) -> Tensor:
        """Loss of each pair, differentiable.

        Args:
            win, lose: fp32 [P], log-ratios of policy to reference, or log-probabilities without a reference.
            config: beta and whatever else it reads.
        Returns: fp32 [P].
        """
        raise NotImplementedError(f"{type(self).__name__}: says nothing of a pair's loss; define of_pairs")

    def __call__(self, policy: Tensor, reference: Tensor, side: Side, config: TrainConfig) -> PairDPOOutput:
        """The loss and what it says about each pair, by packed tokens.

        Args:
            policy, reference: weighted log-probabilities, fp32 [T].
            side: which token is of which pair's win or lose, and which pairs count.
            config: the settings.
        """
        ratio = policy - reference if self.needs_reference else policy
        is_mean = self.means_over_tokens or config.length_normalize
        win, lose = (side.pair_means(ratio) if is_mean else side.pair_sums(ratio)).unbind(1)
        losses = self.of_pairs(win, lose, config)
        if not isinstance(losses, Tensor) or losses.shape != win.shape:
            given = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise InputError(
                f"train.loss_type {config.loss_type}: of_pairs gave {given}, expected a tensor [{len(win)}], a value "
                "for each pair; correct it"
            )
        if policy.requires_grad and not losses.requires_grad:
            raise InputError(
                f"train.loss_type {config.loss_type}: of_pairs gave no gradient; compute the loss from win and lose"
            )
        # Pairs that lack the side have ratios of 0, whose loss may be anything.
        has_side, total = side.pair_weight > 0, side.pair_weight.sum().clamp(min=1)
        loss = torch.where(has_side, losses * side.pair_weight, 0.0).sum() / total
        win, lose = config.beta * win.detach(), config.beta * lose.detach()
        accuracy = ((win > lose) * side.pair_weight).sum() / total
        return PairDPOOutput(loss, win, lose, win - lose, accuracy)


class OpLoss(PairLoss):
    """A loss of the op, in one kernel."""

    def __init__(self, loss_type: str) -> None:
        self.loss_type, self.smooths_labels = loss_type, LOSS_TYPES[loss_type]

    def __call__(self, policy: Tensor, reference: Tensor, side: Side, config: TrainConfig) -> PairDPOOutput:
        """See PairLoss."""
        return pair_dpo(
            policy,
            reference,
            side.segment,
            len(side.pair_weight),
            beta=config.beta,
            loss_type=self.loss_type,
            label_smoothing=config.label_smoothing,
            pair_weight=side.pair_weight,
            length_normalize=config.length_normalize or self.means_over_tokens,
        )


class SimPO(OpLoss):
    """SimPO (arXiv 2405.14734): means of the policy's own log-probabilities, and a margin in place of a reference."""

    needs_reference = False
    means_over_tokens = True

    def __init__(self) -> None:
        super().__init__("sigmoid")
        self.smooths_labels = False

    def __call__(self, policy: Tensor, reference: Tensor, side: Side, config: TrainConfig) -> PairDPOOutput:
        """See PairLoss; the rewards are without the margin."""
        # The op takes a mean of (policy - reference): a reference of margin / beta on the win subtracts the margin.
        reference = torch.where(side.segment % 2 == 0, config.simpo_margin / config.beta, 0.0)
        result = super().__call__(policy, reference, side, config)
        win_reward = result.win_reward + config.simpo_margin * side.pair_weight
        margin = win_reward - result.lose_reward
        accuracy = ((margin > 0) * side.pair_weight).sum() / side.pair_weight.sum().clamp(min=1)
        return result._replace(win_reward=win_reward, margin=margin, accuracy=accuracy)


SIMPO = SimPO()


@functools.cache
def find_loss(name: str) -> PairLoss:
    """The loss of a name, or "module:object" of your own. Raises: InputError if there is none."""
    has = ("needs_reference", "means_over_tokens", "smooths_labels", "__call__")
    return OpLoss(name) if name in LOSS_TYPES else resolve(LOSSES, name, "train.loss_type", has)


def check_loss(config: TrainConfig) -> None:
    """Raises InputError where a setting has no meaning for the loss."""
    loss = find_loss(config.loss_type)
    if config.label_smoothing and not loss.smooths_labels:
        smoothed = " or ".join(name for name, smooths in LOSS_TYPES.items() if smooths)
        raise InputError(
            f"train.label_smoothing: expected 0 with loss_type {config.loss_type}, got {config.label_smoothing}; "
            f"take {smoothed}"
        )
    if config.elbo_weighting and (config.length_normalize or loss.means_over_tokens):
        raise InputError(
            "train.elbo_weighting: expected false where log-probabilities are means over tokens, got true; it bounds "
            "their sum"
        )
