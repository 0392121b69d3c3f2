"""`hermesflow bench drop-in`: a published class's methods before and after hermesflow.accelerate, in one run.

    t2i_generate    images of several prompts, with guidance
    mmu_generate    one answer about one image, greedy, to its full length
    pair_dpo_step   loss_for_unidpo of wins and of loses, of a policy and of a frozen reference, the published loss, and
                    the backward pass; called as train_pairdpo.py calls it, without batch_size_mmu, so that every label
                    of every sequence counts as a caption's too

Of MMaDA's class the first two; see accelerated_mmada.py. The model is a stand-in of the class (tests/showo_stand_in,
tests/mmada_stand_in), or with --code the class of a checkout of Show-o, HermesFlow or MMaDA, at random weights. Both
sides have the same weights and read the same ids and masks, made before the clock starts. What they give is compared
before anything is timed; images by a single step with a head so sharp that nothing is random.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

from torch import nn

from hermesflow.benchmarks.accelerated_mmada import MMaDACalls
from hermesflow.benchmarks.accelerated_showo import CASES as CASES
from hermesflow.benchmarks.accelerated_showo import SHAPES, Calls
from hermesflow.benchmarks.masked_tasks import TASK_SHAPES
from hermesflow.benchmarks.measuring import ROOT, Effort, Part
from hermesflow.benchmarks.runner import Contest, ModelSettings, Run, check_names
from hermesflow.runtime.files import InputError

EFFORT = Effort(seconds=20.0, min_rounds=3, max_rounds=50)
STAND_INS = {family: ROOT / "tests" / f"{family}_stand_in" for family in ("showo", "mmada")}
CLASSES = {"showo": "Showo", "mmada": "MMadaModelLM"}
MODULES = {"Showo": "models.modeling_showo", "MMadaModelLM": "models.modeling_mmada"}
"""Where a checkout has its class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings(ModelSettings):
    """What to measure."""

    family: str = "showo"
    """One of CLASSES."""
    code: Path | None = None
    """Checkout of the class's code; None is the stand-in."""

    def __post_init__(self) -> None:
        check_names("--family", [self.family], CLASSES)
        self.check(SHAPES if self.family == "showo" else TASK_SHAPES, self.calls.CASES)
        if self.code is None and not STAND_INS[self.family].exists():
            raise InputError(
                "drop-in: the stand-in of the published class is not installed; give --code FOLDER, a checkout of its "
                f"code, or run it in a checkout of this repository, which has tests/{STAND_INS[self.family].name}"
            )

    @property
    def calls(self) -> type[Calls]:
        """Of the family."""
        return {"showo": Calls, "mmada": MMaDACalls}[self.family]


def run_accelerated(settings: Settings) -> int:
    """Measure, print a table, write lines.

    Args:
        settings: what to measure and where to write.
    Returns: 0, or 1 if the fast methods do not give what the original ones give.
    Raises: InputError if a file cannot be written, or the checkout has no such class.
    """
    published = load_class(settings.code or STAND_INS[settings.family], CLASSES[settings.family])
    asked = settings.cases or settings.calls.CASES
    name = "drop_in" if settings.family == "showo" else f"drop_in-{settings.family}"
    run = Run(name, settings, EFFORT, settings.torch_dtype)
    calls = settings.calls(published, settings.shape, run.device, settings.torch_dtype)
    names = [name for name in asked if calls.has(name)]
    run.notes += [f"{name}: the class has no loss_for_unidpo" for name in asked if name not in names]
    if not run.is_right(f"{name}: {wrong}" for name in names if (wrong := calls.compare(name))):
        return 1
    for name in names:
        run.measure(_contest(name, settings, calls))
    run.print_table("the original method")
    return 0


def load_class(checkout: Path, name: str = "Showo") -> type[nn.Module]:
    """A published class of a checkout, which stays imported under the checkout's own name of its module.

    Args:
        checkout: of Show-o or HermesFlow, or of MMaDA.
        name: one of MODULES.
    Raises: InputError if there is none, or what it imports is missing.
    """
    for known in [known for known in sys.modules if known.split(".")[0] == "models"]:  # of another checkout
        del sys.modules[known]
    package = ModuleType("models")  # its own __init__ imports far more
    package.__path__ = [str(checkout / "models")]
    sys.modules["models"] = package
    try:
        return getattr(importlib.import_module(MODULES[name]), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{checkout}: no {MODULES[name]}.{name} can be imported ({error}); give a checkout that has it, in an "
            "environment with its requirements"
        ) from error


def _contest(name: str, settings: Settings, calls: Calls) -> Contest:
    fast, original = (Part(run=partial(calls.run, name, side)) for side in Calls.SIDES)
    return Contest(
        case=name,
        shape=f"{settings.shape}: {calls.describe(name)}",
        dtype=settings.torch_dtype,
        ours={"engine": fast},
        baselines={"published" if settings.code else "stand-in": [original]},
        passes=calls.passes(name),
        items=calls.items(name),
    )
