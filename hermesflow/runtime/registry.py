"""What users choose by name, and the file that holds it: one more line registers one more.

A setting takes such a name, or "module:attribute" of a module that Python can import. A name's module is imported when
it is first asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from hermesflow.runtime.files import InputError, reason_of, shown

FAMILIES = {
    "bagel": "hermesflow.models.bagel:FAMILY",
    "chameleon": "hermesflow.models.chameleon:FAMILY",
    "emu3": "hermesflow.models.emu3:FAMILY",
    "mmada": "hermesflow.models.mmada:FAMILY",
    "lumina-dimoo": "hermesflow.models.lumina_dimoo:FAMILY",
    "janus": "hermesflow.models.janus:FAMILY",
    "seed-x": "hermesflow.models.seed_x:FAMILY",
    "showo": "hermesflow.models.showo:FAMILY",
    "show-o2": "hermesflow.models.show_o2:FAMILY",
    "tiny": "hermesflow.models.tiny:FAMILY",
}
"""Of models (models/family.py); a checkpoint finds its own by config.json."""

IMAGE_SCORERS = {
    "soft": "hermesflow.scoring.self_answers:soft",
    "hard": "hermesflow.scoring.self_answers:hard",
    "mixed": "hermesflow.scoring.self_answers:mixed",
}
"""curation.score: (model, codes, records, match_answers) -> Judged [B][n]; "module:function" is simpler (Scorers)."""
REWARDS = {
    "log": "hermesflow.scoring.self_answers:log",
    "soft": "hermesflow.scoring.self_answers:soft",
    "hard": "hermesflow.scoring.self_answers:hard",
    "prompt": "hermesflow.scoring.self_answers:prompt",
    "mixed": "hermesflow.scoring.self_answers:mixed",
}
"""grpo.rewards: as IMAGE_SCORERS; the scale is free, since rewards are compared within a prompt alone."""
CAPTION_SCORERS = {
    "bert-cls": "hermesflow.scoring.captions:bert_cls",
    "sentence": "hermesflow.scoring.captions:sentence",
    "exact": "hermesflow.scoring.captions:EXACT",
    "normalized": "hermesflow.scoring.captions:NORMALIZED",
    "normalised": "hermesflow.scoring.captions:NORMALIZED",  # its old name
    "token-f1": "hermesflow.scoring.captions:TOKEN_F1",
    "attribute-f1": "hermesflow.worlds.shapes:ATTRIBUTE_F1",
}
"""curation.caption_scorer: (config) -> CaptionScorer; "module:function" is simpler."""
ANSWER_SCORERS = {
    "likelihood": "hermesflow.scoring.captions:likelihood",
    "sentence": "hermesflow.scoring.captions:sentence_answers",
    "exact": "hermesflow.scoring.captions:exact_answers",
    "normalized": "hermesflow.scoring.captions:normalized_answers",
    "normalised": "hermesflow.scoring.captions:normalized_answers",  # its old name
}
"""curation.answer_scorer: (config) -> AnswerMatcher, None to score choices; "module:function" is simpler."""

ALGORITHMS = {
    "pair-dpo": "hermesflow.algorithms.pair_dpo:PairDPO", "grpo": "hermesflow.algorithms.grpo:GRPO",
    "own-drawings": "hermesflow.algorithms.own_drawings:OwnDrawings",
    "caption-grpo": "hermesflow.algorithms.caption_grpo:CaptionGRPO",
}  # fmt: skip
"""selfplay.algorithm: (model, pairs, config, seed) -> Algorithm; (model, records, config, seed) where it is online."""
LOSSES = {"simpo": "hermesflow.algorithms.losses:SIMPO"}
"""train.loss_type, beside LOSS_TYPES of the op (kernels/__init__.py): PairLoss objects."""

SOURCES = {"shapes": "hermesflow.worlds.shapes:training_records"}
"""data.source, beside files: (seed, count) -> records of training scenes."""
EVALUATIONS = {
    "builtin": "hermesflow.evaluation.builtin:BUILTIN",
    "records": "hermesflow.evaluation.on_records:ON_RECORDS",
}
"""eval.suite: Evaluation objects."""
SUITES = {
    "geneval": "hermesflow.evaluation.suites.geneval:SUITE",
    "dpg": "hermesflow.evaluation.suites.dpg:SUITE",
    "tifa": "hermesflow.evaluation.suites.tifa:SUITE",
    "compbench": "hermesflow.evaluation.suites.compbench:SUITE",
    "genai": "hermesflow.evaluation.suites.genai:SUITE",
    "wise": "hermesflow.evaluation.suites.wise:SUITE",
}
"""hermesflow eval --suite: Suite objects (evaluation/suites/suite.py)."""
_MISSING = object()


def resolve(table: Mapping[str, str], name: str, key: str, has: Sequence[str] = (), is_class: bool = False) -> Any:
    """The object that a name stands for.

    Args:
        table: one of the tables above.
        name: of the table, or "module:attribute".
        key: the setting that holds it, for messages.
        has: attributes that the object must have.
        is_class: whether it must be a class; else it must be none.
    Raises: InputError if there is no such name, module or attribute, or the object is of another kind.
    """
    if ":" not in name and name not in table:
        raise InputError(f'{key} {shown(name)}: expected {", ".join(table)}, or "module:attribute"')
    module_name, _, attribute = table.get(name, name).partition(":")
    try:
        module = importlib.import_module(module_name)
        found = getattr(module, attribute, _MISSING)
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything
        is_absent = isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]
        fix = (
            "install it, or set PYTHONPATH to its folder"
            if is_absent
            else "correct it (HERMESFLOW_DEBUG=1 shows where)"
        )
        raise InputError(
            f"{key} {name}: the module {module_name} cannot be imported ({reason_of(error)}); {fix}"
        ) from error
    if found is _MISSING:
        raise InputError(f"{key} {name}: the module {module_name} has no {attribute}; check the name")
    missing = [item for item in has if not hasattr(found, item)]
    if missing:
        raise InputError(
            f"{key} {name}: {attribute} is {shown(found)}, which has no {', '.join(missing)}; name another object"
        )
    if isinstance(found, type) != is_class and has:
        wanted, given = ("a class", "none") if is_class else (f"an object such as {attribute}()", "a class")
        raise InputError(f"{key} {name}: expected {wanted}, got {given}; name another object of {module_name}")
    return found
