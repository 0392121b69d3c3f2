"""What a worker does: its share of a run's candidates or of an evaluation, beside others on any machines."""

from __future__ import annotations

from hermesflow.config import Config
from hermesflow.runs.run import Run


def share_candidates(config: Config, number: int, *, by_ray: bool = False) -> str:
    """Makes a round's candidates beside other workers, until all are there.

    Args:
        config: the run's settings.
        number: of the round.
        by_ray: as tasks of Ray; else in this process.
    Returns: a line that says what comes next.
    Raises: InputError as Run.share_candidates, and as share_by_ray.
    """
    run = Run(config, as_worker=True)
    if by_ray:
        from hermesflow.runs.ray_driver import share_by_ray

        share_by_ray(run, number)
    else:
        run.share_candidates(number)
    option = "--ray" if by_ray else "--worker"
    return f"{run.path(number, 'candidates')}: all are there; the same command without {option} makes the pairs"


def share_evaluation(config: Config, number: int) -> str:
    """Makes the parts of a round's evaluation (0: before the first) beside other workers, until all are there.

    Returns: a line that says what comes next.
    Raises: InputError as Run.share_evaluation.
    """
    run = Run(config, as_worker=True)
    run.share_evaluation(number)
    return f"{run.path(number)}: all of it is measured; hermesflow selfplay with the same settings takes it from there"
