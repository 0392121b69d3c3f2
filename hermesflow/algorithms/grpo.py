"""GRPO (arXiv 2402.03300) for masked image tokens, online, by the law of the decoder itself.

At each rollout the policy draws a group of images of each prompt and judges them. With A an image's advantage within
its group, and pi_t the probability of the codes that decoding step t kept (engine/rollout_logprob.py), a step learns

    L = -1 / (B N) sum over B images of sum over steps t of min(rho_t A, clip(rho_t, 1 - low, 1 + high) A)
        + kl_weight * mean over codes of k3(policy || reference) + replay_weight * replay

with N the codes of an image and rho_t the ratio of pi_t to what it was when the images were drawn: exactly 1 in the
first update on a rollout. Draws are pure functions of the weights, the seed and the step, so that a resumed run repeats
them.

Sources: the ratio of a decoding step and its clipping are those of Mask-GRPO (arXiv 2510.13418); k3 is J. Schulman,
"Approximating KL divergence"; the replay is that of Pair-DPO.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hermesflow.algorithms.algorithm import Pass, Reference
from hermesflow.algorithms.batch import REPLAY, PairBatch, PairVisit
from hermesflow.algorithms.packers import make_packer
from hermesflow.algorithms.packing import TreeBuilder, plan_passes, referenced_sides
from hermesflow.algorithms.pair_dpo import replay_loss, replay_metric
from hermesflow.algorithms.policy import Policy
from hermesflow.algorithms.references import live_reference, make_reference
from hermesflow.config import Config
from hermesflow.data.pairs import records_table
from hermesflow.data.records import Record
from hermesflow.engine.decoders.autoregressive import CodeSamplingParams
from hermesflow.engine.rollout_logprob import DrawnCodes, RolloutStates, code_logprobs
from hermesflow.engine.token_layout import Layout
from hermesflow.engine.transformer import Transformer
from hermesflow.kernels.linear_logprob import linear_logprob
from hermesflow.kernels.span_tree import SpanForest, SpanTree
from hermesflow.models.model import Model
from hermesflow.runtime.distributed import gather, gathered, rank, world_size
from hermesflow.runtime.files import InputError
from hermesflow.runtime.seeds import candidate_seeds, shuffled_epochs
from hermesflow.scoring.scorers import find_matcher, find_rewards
from hermesflow.scoring.self_answers import check_record

_SPREAD_SHARE = 0.25
"""Of the groups' mean standard deviation, added to each group's own."""
_LEAST_ADVANTAGE = 0.1
"""Of an image that is worth a pass."""


@dataclass(frozen=True)
class Group:
    """The images of one prompt in one rollout.

    record, rollout: numbers of the record and of the rollout.
    codes, kept_at: int64 [G, N]; logprob fp32 [G, N]; drawn int32 [G, S, N]; see ImageRollout.
    rewards, advantages: fp64 [G]; the advantages of images that teach nothing are 0.
    """

    record: int
    rollout: int
    codes: np.ndarray
    kept_at: np.ndarray
    logprob: np.ndarray
    drawn: np.ndarray
    rewards: np.ndarray
    advantages: np.ndarray

    @property
    def used(self) -> list[int]:
        """Images that teach something."""
        return np.flatnonzero(self.advantages).tolist()


@dataclass(frozen=True)
class GRPOBatch:
    """One pass: the states of drawn images and the replay in one tree.

    layout, params: of the drawn codes' law.
    codes: what the rows of the states predict, T in all.
    replay: the replay's part, over the same tree.
    unguided_tree: the unguided half's states, where its pass is without a gradient; None: they are in the same tree.
    segment: int64 [T], of each code its decoding step of its image, of M in all.
    advantage, weight: fp32 [M]; weight is 1 unless steps were drawn for the gradient.
    drawn_logprob: fp32 [T], what the decoder found when it drew a code that it kept; NaN of one that was masked again.
    groups: those of the pass. totals: {"groups", "images", "steps", REPLAY: visits} of the whole step.
    key: of the pass among those of its rollout.
    """

    layout: Layout
    params: Any
    codes: DrawnCodes
    replay: PairBatch
    unguided_tree: SpanTree | None
    segment: Tensor
    advantage: Tensor
    weight: Tensor
    drawn_logprob: Tensor
    groups: Sequence[Group]
    totals: Mapping[str, int]
    key: tuple[int, ...]

    @property
    def tree(self) -> SpanTree:
        """Of states and replay."""
        return self.replay.tree

    @property
    def rows(self) -> Tensor:
        """Those of the tree whose hidden states are needed: guided, unguided, and the replay's."""
        unguided = [self.codes.unguided] if self.unguided_tree is None else []
        replayed = [self.replay.rows] if self.replay.sides else []
        return torch.cat([self.codes.guided, *unguided, *replayed])

    def logprobs(self, transformer: Transformer) -> Tensor:
        """Log-probabilities fp32 of the drawn codes [T], by the decoder's law, and of the replay's targets after
        them."""
        guided, unguided = self.codes.guided, self.codes.unguided
        with torch.no_grad():
            aside = None if self.unguided_tree is None else transformer(self.unguided_tree, rows=unguided)
        hidden = transformer(self.tree, embeds=self.replay.embeds, rows=self.rows)
        of_guided, hidden = hidden.tensor_split([len(guided)])
        of_unguided, hidden = hidden.tensor_split([len(unguided)]) if aside is None else (aside, hidden)
        head = transformer.head
        logprob = code_logprobs(transformer, self.layout, self.params, of_guided, of_unguided, self.codes.targets)
        if not self.replay.sides:
            return logprob
        return torch.cat([logprob, linear_logprob(hidden, head.weight, self.replay.targets, bias=head.bias)])


class GRPO:
    """The algorithm: see Algorithm. It is online: it learns from records, whose images it draws itself."""

    name = "GRPO"
    is_online = True
    _batch = GRPOBatch

    def __init__(self, model: Model, records: Sequence[Record], config: Config, seed: int) -> None:
        """
        Args:
            model: draws, judges and is trained.
            records: with codes and questions, and ids of their own.
            config: grpo, train, and from curation and drawing how images are drawn and answers found.
            seed: of prompts, images, the steps that are trained, and the replay.
        Raises: InputError on records that cannot be judged, or a model whose decoder does not say how it draws.
        """
        self.model, self.records, self.config, self.seed = model, records, config, seed
        self.check_model(model, config)
        for record in records:
            check_record(model, record)
        self._ways = _ways_to_draw(model.sampling_of(config.drawn_by(config.curation)), config)
        self.packer = make_packer(model, records_table(records), config.train, seed).only(REPLAY)
        self._rewards, self._match_answers = find_rewards(config.grpo), find_matcher(config.curation)
        self._num_codes = model.layout.num_image_tokens
        self._groups: tuple[int, list[Group]] = (-1, [])
        self._old: dict[tuple[int, ...], Tensor] = {}

    @staticmethod
    def check_model(model: Model, config: Config) -> None:
        """Raises InputError on a model whose decoder does not say how it draws, or draws in a way without chance."""
        if not hasattr(model.engine.image_decoder, "rollout"):
            raise InputError(
                "selfplay.algorithm grpo: the model's image decoder does not say how it draws; take pair-dpo"
            )
        if config.grpo.likelihood == "masked" and model.layout.image_mode == "causal":
            raise InputError("grpo.likelihood masked: the model draws code by code, without masks; set it to kept")
        _ways_to_draw(model.sampling_of(config.drawn_by(config.curation)), config)

    @staticmethod
    def check(config: Config) -> None:
        """Raises InputError on settings that do not go together."""
        if config.model.judge:
            raise InputError("model.judge: grpo takes its rewards from the section grpo; leave it empty")
        if not any((*config.grpo.reward_weights, config.grpo.kl_weight, config.train.replay_weight)):
            raise InputError(
                "grpo: nothing to learn: reward_weights, kl_weight and train.replay_weight are all 0; set one of them"
            )
        find_rewards(config.grpo)
        find_matcher(config.curation)
        check_rollouts(config)

    def visits(self, step: int | None) -> list[Group]:
        """The groups of a step, drawn and judged with the weights as they are now, where they are not there yet.

        Raises: InputError as the rewards do.
        """
        number = step // self.config.grpo.updates_per_rollout
        if self._groups[0] != number:
            self._old.clear()
            self._groups = number, self._draw(number)
        return self._groups[1]

    def passes(self, visits: Sequence[Group]) -> list[Pass]:
        """See Algorithm."""
        sizes = [self._num_tokens(group) for group in visits]
        plan = plan_passes(sizes, self.config.train.tokens_per_pass, world_size())[rank() :: world_size()]
        replayed = self.packer.num_pairs([visit_of(group) for group in visits]).get(REPLAY, 0)
        totals = {
            "groups": len(visits),
            "images": sum(len(group.used) for group in visits),
            "steps": sum(len(_steps_of(group.kept_at[number])) for group in visits for number in group.used),
            REPLAY: replayed,
        }
        return [
            Pass(
                functools.partial(self._pack, [visits[item] for item in items or [0]], totals, tuple(items)),
                bool(items),
            )
            for items in plan
        ]

    def metric_names(self, visits: Sequence[Group]) -> list[str]:
        """Means over groups: reward, reward_std (its standard deviation) and left_out (whether it teaches nothing).
        Means over kept codes: logprob, and drift, how far it is from what the decoder found. clipped: the share of
        decoding steps whose ratio was clipped. kl: mean k3 a code."""
        names = ["reward", "reward_std", "left_out", "clipped"]
        names += [] if self.config.grpo.likelihood == "masked" else ["logprob", "drift"]
        names += ["kl"] if self.config.grpo.kl_weight else []
        return names + ([f"{REPLAY}/{replay_metric(self.config.train)}"] if self.config.train.replay_weight else [])

    def reference(self, policy: Policy, steps: Iterable[int | None], path: Path) -> Reference:
        """Of the replay, whose questions are known before the first step; of drawn codes too where it is live. In a run
        it is the model before the first round."""
        if self.config.grpo.kl_weight:
            return live_reference(policy)
        rollouts = sorted({step // self.config.grpo.updates_per_rollout for step in steps})
        is_needed = REPLAY in referenced_sides(self.config.train)
        visits = [PairVisit(record, number) for number in rollouts for record in self._chosen(number) if is_needed]
        reference = make_reference(policy, self.packer, visits, path)
        return reference if reference.is_live else _ReplayReference(reference)

    def loss(self, logprob: Tensor, reference: Tensor, batch: GRPOBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """See Algorithm."""
        train, grpo, num_codes = self.config.train, self.config.grpo, len(batch.codes.targets)
        ours, replayed = logprob[:num_codes], logprob[num_codes:]
        num_images, weight = max(batch.totals["images"], 1), batch.weight[batch.segment]
        old = self._old.setdefault(batch.key, ours.detach())
        moved = ours.new_zeros(len(batch.advantage)).index_add(0, batch.segment, ours - old)
        ratio = moved.clamp(max=20).exp()
        clipped = ratio.clamp(1 - grpo.clip_low, 1 + grpo.clip_high)
        gain = torch.minimum(ratio * batch.advantage, clipped * batch.advantage)
        per_code = 1 / (num_images * self._num_codes)
        loss = -(gain * batch.weight).sum() * per_code
        is_kept, found = batch.drawn_logprob.isfinite(), ours.detach()
        drift = torch.where(is_kept, found - batch.drawn_logprob, 0.0)
        share = {
            "logprob": (torch.where(is_kept, found, 0.0) * weight).sum() * per_code,
            "drift": (drift * weight).sum() * per_code,
            "clipped": ((ratio != clipped) * batch.weight).sum() / max(batch.totals["steps"], 1),
        }
        share |= {
            name: loss.new_tensor(value)
            for name, value in _rollout_metrics(batch.groups, batch.totals["groups"]).items()
        }
        if grpo.kl_weight:
            behind = (reference[:num_codes] - ours).clamp(max=20)
            divergence = ((behind.exp() - 1 - behind) * weight).sum() * per_code
            loss = loss + grpo.kl_weight * divergence
            share["kl"] = divergence.detach()
        if batch.replay.sides:
            kept = (
                replay_loss(replayed, reference[num_codes:], batch.replay.sides[REPLAY], train) / batch.totals[REPLAY]
            )
            loss = loss + train.replay_weight * kept
            share[f"{REPLAY}/{replay_metric(train)}"] = kept.detach()
        return loss, share

    def _chosen(self, rollout: int) -> list[int]:
        """Records of a rollout: consecutive entries of an endless row of shuffled epochs."""
        count = self.config.grpo.prompts_per_step
        positions = range(rollout * count, (rollout + 1) * count)
        return [number for number, _ in shuffled_epochs([self.seed, 0], len(self.records), positions)]

    def _draw(self, rollout: int) -> list[Group]:
        """Each process draws and judges its share of the prompts; all have all groups."""
        share = slice(rank(), None, world_size())
        with gathered(self.model.transformer):
            drawn = self._draw_share(self._chosen(rollout)[share], rollout)
        groups = [group for of_place in zip_longest(*gather(drawn)) for group in of_place if group is not None]
        found = advantages(np.stack([group.rewards for group in groups]))
        return [replace(group, advantages=row) for group, row in zip(groups, found, strict=True)]

    def _draw_share(self, numbers: Sequence[int], rollout: int) -> list[Group]:
        """The groups of some records of a rollout, still without advantages."""
        model, size = self.model, self.config.grpo.num_images
        records = [self.records[number] for number in numbers]
        if not records:
            return []
        drawn = model.engine.rollout(
            [model.image_prompt(record.caption) for record in records],
            num_images=size,
            seeds=torch.from_numpy(
                candidate_seeds(self.seed, [item.id for item in records], f"rollout {rollout}", size)
            ),
            sampling=self._params(rollout),
        )
        rewards = np.zeros((len(records), size))
        for score, weight in self._rewards:
            judged = score(model, drawn.codes, records, self._match_answers)
            rewards += weight * np.array([[item.score for item in row] for row in judged])
        arrays = [getattr(drawn, item.name).cpu().numpy() for item in fields(drawn)]
        rows = zip(numbers, rewards, *arrays, strict=True)
        return [Group(number, rollout, *of_record, of_group, np.zeros(size)) for number, of_group, *of_record in rows]

    def _num_tokens(self, group: Group) -> int:
        """Of a group, at most; images share the states that are equal."""
        params, num_steps = self._params(group.rollout), self._num_states(group)
        num_steps = 1 if self.model.layout.image_mode == "causal" else num_steps  # all of them are rows of one image
        halves = 2 if params.guidance_scale else 1
        layout = self.model.layout
        prompt = layout.text_prompt(self._prompt_of(group)) if layout.is_bidirectional else ()
        states = halves * num_steps * len(group.used) * (len(prompt) + layout.image_length)
        return states + self.packer.num_tokens(visit_of(group))

    def _pack(
        self, groups: Sequence[Group], totals: Mapping[str, int], key: tuple[int, ...], device: torch.device
    ) -> GRPOBatch:
        """One pass over these groups."""
        builder, visits = TreeBuilder(), [visit_of(group) for group in groups]
        drawn = [(group, number) for group in groups for number in group.used]
        codes, weights, params, aside = self._add_drawn(builder, groups, drawn)
        for index, visit in enumerate(visits):
            self.packer.add_replay(builder, index, visit)
        # Of each image, each of its decoding steps or masks.
        (owner, _), segment = torch.unique(torch.stack([codes.owners, codes.steps]), dim=1, return_inverse=True)
        of_drawn = {"advantages": [group.advantages[number] for group, number in drawn], "weights": weights}
        advantage, weight = (torch.tensor(values, dtype=torch.float32)[owner] for values in of_drawn.values())
        found = torch.full(codes.targets.shape, torch.nan)
        drawn_logprob = found if self._is_masked else self._drawn_logprob(drawn, codes)
        return self._batch(
            self.model.layout,
            params,
            DrawnCodes(*(values.to(device) for values in codes)),
            builder.build_batch(visits, device, totals),
            aside.build(device) if aside is not None and aside.packed else None,
            *(values.to(device) for values in (segment, advantage, weight, drawn_logprob)),
            groups,
            totals,
            key,
        )

    def _add_drawn(
        self, builder: TreeBuilder, groups: Sequence[Group], drawn: Sequence[tuple[Group, int]]
    ) -> tuple[DrawnCodes, list[float], Any, SpanForest | None]:
        """The states of what was drawn, (group, number in it) each: what their rows predict, what the steps of each
        weigh, the settings of the law, and the unguided half's spans where they are apart."""
        aside = None if self.config.grpo.train_unguided else SpanForest()
        params = self._params(groups[0].rollout)
        params = replace(params, guidance_scale=0.0, temperature=1.0) if self._is_masked else params
        states = RolloutStates(self.model.layout, params, builder, aside)
        # Of a group that teaches nothing, too, so that no tree is empty; in a bidirectional layout of those alone.
        for group in [each for each in groups if not (self.model.layout.is_bidirectional and each.used)]:
            states.guided.add_condition(self.model.layout.text_prompt(self._prompt_of(group)))
        add = self._add_masked if self._is_masked else self._add_image
        weights = [add(states, group, image) for group, image in drawn]
        return states.drawn(), weights, params, aside

    @property
    def _is_masked(self) -> bool:
        return self.config.grpo.likelihood == "masked"

    def _params(self, rollout: int) -> Any:
        return self._ways[rollout % len(self._ways)]

    def _prompt_of(self, group: Group) -> list[int]:
        return self.model.image_prompt(self.records[group.record].caption)

    def _drawn_logprob(self, drawn: Sequence[tuple[Group, int]], codes: DrawnCodes) -> Tensor:
        """What the decoder found when it drew codes that it kept, fp32 [T]; NaN of others."""
        if not drawn:
            return torch.zeros(0)
        places = codes.owners, codes.positions
        logprob = torch.from_numpy(np.stack([group.logprob[number] for group, number in drawn]))[places]
        kept_at = torch.from_numpy(np.stack([group.kept_at[number] for group, number in drawn]))[places]
        return logprob.masked_fill(kept_at != codes.steps, torch.nan)

    def _add_image(self, states: RolloutStates, group: Group, image: int) -> float:
        """Adds an image's states; returns what its steps weigh, so that those drawn stand for all."""
        grpo, codes, kept_at = self.config.grpo, group.codes[image], group.kept_at[image]
        steps, drawn = np.unique(kept_at), group.drawn[image] if grpo.likelihood == "drawn" else None
        count = grpo.trained_steps or len(steps)
        rng = np.random.default_rng([self.seed, 5, group.rollout, group.record, image])
        chosen = rng.permutation(steps)[:count].tolist()
        states.add(self._prompt_of(group), codes, kept_at, drawn=drawn, steps=chosen)
        return len(steps) / len(chosen)

    def _add_masked(self, states: RolloutStates, group: Group, image: int) -> float:
        """Adds an image under random masks, a segment each; their codes weigh so that the sum stands for all codes."""
        codes = group.codes[image]
        hidden_at = self._masks(group, image, len(codes))
        states.add_masked(self._prompt_of(group), codes, hidden_at)
        return len(codes) / sum(map(len, hidden_at))

    def _masks(self, group: Group, number: int, length: int) -> list[np.ndarray]:
        """Places that masks of what was drawn hide, at times that are spread evenly from a random one."""
        rng = np.random.default_rng([self.seed, 6, group.rollout, group.record, number])
        num_masks = self._num_states(group)
        first = rng.random()
        times = first + (1 - first) * np.arange(num_masks) / num_masks
        counts = np.maximum(1, np.round(times * length).astype(int))
        return [np.sort(rng.permutation(length)[:count]) for count in counts]

    def _num_states(self, group: Group) -> int:
        """Decoding steps, or masks, of an image that the gradient is computed for, at most."""
        num_steps = len(_steps_of(group.kept_at))
        trained = self.config.grpo.trained_steps
        return (
            (trained or num_steps) if self.config.grpo.likelihood == "masked" else min(num_steps, trained or num_steps)
        )


def _steps_of(kept_at: np.ndarray) -> np.ndarray:
    """Those that kept something."""
    return np.unique(kept_at[kept_at >= 0])


def check_rollouts(config: Config) -> None:
    """Raises InputError on settings of training that do not go with rollouts."""
    train, grpo = config.train, config.grpo
    if train.checkpoint_every % grpo.updates_per_rollout:
        raise InputError(
            f"train.checkpoint_every {train.checkpoint_every}: a run resumes before a rollout; give a multiple of "
            f"grpo.updates_per_rollout {grpo.updates_per_rollout}"
        )
    if grpo.kl_weight and train.reference != "live":
        raise InputError(
            "grpo.kl_weight: no reference can be kept of images that are not drawn yet; set train.reference to live"
        )


def _ways_to_draw(default: Any, config: Config) -> list[Any]:
    """Sampling settings that the rollouts take in turn: fewer steps where images are drawn in steps. Raises: InputError
    on temperature 0, top_k or top_p."""
    if not default.temperature:
        raise InputError("curation.temperature: expected above 0 with grpo, got 0; images of a prompt must differ")
    if isinstance(default, CodeSamplingParams):
        if default.top_k or default.top_p != 1:
            raise InputError(
                f"drawing.top_k {default.top_k}, drawing.top_p {default.top_p:g}: grpo needs the unfiltered "
                "distribution; set drawing.top_k to 0 and drawing.top_p to 1"
            )
        return [default]
    counts = [max(1, round(fraction * default.num_steps)) for fraction in config.grpo.step_fractions]
    return [replace(default, num_steps=count) for count in counts]


class _ReplayReference:
    """Of the replay alone; of drawn codes zeros, which nothing reads."""

    is_live = False

    def __init__(self, reference: Reference) -> None:
        self._reference = reference

    def logprobs(self, batch: GRPOBatch) -> Tensor:
        """fp32 [T and the replay's]."""
        zeros = torch.zeros(len(batch.codes.targets), device=batch.tree.token_ids.device)
        return torch.cat([zeros, self._reference.logprobs(batch.replay)]) if batch.replay.sides else zeros


def advantages(rewards: np.ndarray) -> np.ndarray:
    """How much better each image is than its group.

    A group's spread counts, so that no group outweighs the others; and a share of the usual spread, so that one whose
    images are all but alike does not turn its rounding into lessons.

    Args:
        rewards: fp64 [B, G].
    Returns: fp64 [B, G], (reward - mean of the group) / (its standard deviation + 0.25 times the groups' mean one); 0
        below 0.1.
    """
    found, spread = rewards - rewards.mean(1, keepdims=True), rewards.std(1, keepdims=True)
    scale = spread + _SPREAD_SHARE * spread.mean()
    found = np.divide(found, scale, out=np.zeros_like(found), where=scale > 0)
    return np.where(np.abs(found) > _LEAST_ADVANTAGE, found, 0.0)


def visit_of(group: Group) -> PairVisit:
    """Its replay's."""
    return PairVisit(group.record, group.rollout)


def _rollout_metrics(groups: Sequence[Group], num_groups: int) -> dict[str, float]:
    """What the rewards were, shares of means over all groups."""
    return {
        "reward": sum(group.rewards.mean() for group in groups) / num_groups,
        "reward_std": sum(group.rewards.std() for group in groups) / num_groups,
        "left_out": sum(not group.used for group in groups) / num_groups,
    }
