"""Several processes that torchrun starts (gloo, on this machine's loopback) do what one process does."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hermesflow.algorithms.algorithm import StepSums, batch_logprobs
from hermesflow.algorithms.batch import PairVisit
from hermesflow.algorithms.grpo import GRPO
from hermesflow.algorithms.packing import PairPacker
from hermesflow.algorithms.pair_dpo import metric_names, pass_objective
from hermesflow.algorithms.policy import Policy
from hermesflow.cli import main
from hermesflow.config import PAPER_OBJECTIVE, ModelConfig, TrainConfig, load_config
from hermesflow.data.records import RecordFile, write_records
from hermesflow.evaluation import builtin
from hermesflow.evaluation.evaluation import Evaluation, evaluate
from hermesflow.models import load_model, open_model
from hermesflow.runs import Run
from hermesflow.runtime import distributed
from hermesflow.runtime.checkpointing import load_checkpoint, save_checkpoint
from hermesflow.runtime.distributed import (
    gather,
    is_main,
    local_device,
    on_main,
    process_group,
    rank,
    shard,
    unshard,
    world_size,
)
from hermesflow.runtime.files import InputError, write_json
from hermesflow.selfplay import evaluate_round, run_selfplay
from hermesflow.training import make_optimizer

SETTINGS = (
    "model.device=cpu", "data.num_records=8", "curation.num_images=3", "curation.num_steps=3", "curation.threshold=0",
    "curation.margin=0", "curation.keep=any", "curation.batch_records=2", "curation.caption_top_k=[4]",
    "train.num_steps=6", "train.pairs_per_step=3", "train.checkpoint_every=2", "train.tokens_per_pass=100",
    "eval.num_prompts=6", "eval.num_understanding=6", "eval.num_steps=3", "selfplay.num_rounds=1", "run.name=t",
)  # fmt: skip
STEPS = {
    "one pass": (7, PAPER_OBJECTIVE),
    "several passes, an odd number of pairs": (5, PAPER_OBJECTIVE | {"tokens_per_pass": 60}),
    "one process without pairs": (1, PAPER_OBJECTIVE),
    "adapters": (5, PAPER_OBJECTIVE | {"lora_rank": 2, "tokens_per_pass": 60}),
    "masks, likelihood and replay": (7, {"nll_weight": 1.0, "replay_weight": 0.5, "tokens_per_pass": 60}),
    "one process without replay": (2, PAPER_OBJECTIVE | {"replay_weight": 0.5}),
}


GRPO_SETTINGS = (
    "train.dtype=float32", "train.tokens_per_pass=400", "train.replay_target=answers", "grpo.prompts_per_step=5",
    "grpo.num_images=3", "grpo.updates_per_rollout=2", "drawing.num_steps=3",
)  # fmt: skip


def launch(*command, processes=2):
    """torchrun in a session of its own."""
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(folders)}
    return subprocess.Popen(
        [*torchrun, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def finish(process, code=0):
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode == 0) == (code == 0), stderr
    return stdout, stderr


def own_lines(stderr):
    """What hermesflow itself said."""
    return [line for line in stderr.splitlines() if line.startswith("hermesflow: ")]


# What the processes of the first test compute, and one process beside them.


def step_of(model, pairs, config):
    """(loss, whole gradients by name) of a step against a reference that differs from the policy."""
    policy = Policy(model, config, 0)
    packer = PairPacker(model, pairs, config, seed=0)
    visits = [PairVisit(pair, 0) for pair in range(len(pairs))]
    totals = packer.num_pairs(visits)
    sums = StepSums(metric_names(totals, config), policy.device)
    for chosen, counts in packer.passes(visits):
        batch = packer.pack(chosen)
        logprob = batch_logprobs(policy.transformer, batch)
        reference = -2.0 - batch.targets % 3 / 3
        loss, shares = pass_objective(logprob, reference, batch, totals, config)
        (loss * (world_size() if counts else 0)).backward()
        if counts:
            sums.add(loss, shares)
    return sums.metrics(), gradients_of(policy)


def grpo_step_of(model, records):
    """(metrics, whole gradients by name) of the second update on a rollout that the processes share out."""
    config = load_config(None, GRPO_SETTINGS)
    policy = Policy(model, config.train, 0)
    learner = GRPO(model, records, config, 0)
    reference = learner.reference(policy, range(2), Path(os.devnull) / "none")
    for step in range(2):
        policy.transformer.zero_grad()
        visits = learner.visits(step)
        sums = StepSums(learner.metric_names(visits), policy.device)
        for pack, counts in learner.passes(visits):
            batch = pack(policy.device)
            logprob = batch_logprobs(policy.transformer, batch)
            loss, shares = learner.loss(logprob - 0.1 * step, reference.logprobs(batch), batch)
            (loss * (world_size() if counts else 0)).backward()
            if counts:
                sums.add(loss, shares)
    return sums.metrics(), gradients_of(policy)


def gradients_of(policy):
    """Whole, by name."""
    return {
        name: parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        for name, parameter in policy.transformer.named_parameters()
        if parameter.requires_grad
    }


def untrained(model, lora_rank=0):
    policy = Policy(model, TrainConfig(dtype="float32", lr=1e-2, lora_rank=lora_rank), 0)
    return policy, make_optimizer(policy.transformer, policy.config)


def trained(model, lora_rank=0):
    """A policy and its optimizer after two steps."""
    policy, optimizer = untrained(model, lora_rank)
    take_step(policy, optimizer)
    take_step(policy, optimizer)
    return policy, optimizer


def take_step(policy, optimizer):
    """With gradients that are a function of each weight alone, whoever holds it."""
    for parameter in policy.transformer.parameters():
        if parameter.requires_grad:
            parameter.grad = (parameter.detach() + 0.1).sin()
    optimizer.step()


def work_of_a_process(folder):
    import pyarrow.parquet as pq

    pairs, model = pq.read_table(folder / "pairs.parquet"), folder / "model"
    for name, (count, settings) in STEPS.items():
        config = TrainConfig(dtype="float32", **settings)
        found = step_of(load_model(str(model)), pairs.slice(0, count), config)
        if is_main():
            torch.save(found, folder / f"{name}.pt")
    records = list(RecordFile(folder / "records.parquet"))
    found = grpo_step_of(load_model(str(model)), records)
    if is_main():
        torch.save(found, folder / "grpo.pt")
    for lora_rank in (1, 0):
        policy, optimizer = trained(load_model(str(model)), lora_rank)
        save_checkpoint(folder / f"of-two-{lora_rank}", policy.transformer, optimizer, {"step": 2}, 2)

    policy, optimizer = untrained(load_model(str(model)))
    assert load_checkpoint(folder / "of-one", policy.transformer, optimizer) == {"step": 2}
    take_step(policy, optimizer)
    weights = {name: value.full_tensor() for name, value in policy.transformer.named_parameters()}
    if is_main():
        torch.save(weights, folder / "resumed.pt")

    assert gather(rank()) == [0, 1]
    assert on_main(lambda: (rank(), world_size(), on_main(lambda: "alone"))) == (0, 1, "alone")
    # A file that one process finds damaged is damaged for all.
    save_checkpoint(folder / "of-two-0", policy.transformer, optimizer, {"step": 3}, 2)
    files = sorted((folder / "of-two-0/step-000003").glob("*.safetensors"))
    assert len(files) == 2
    if is_main():
        files[1].write_bytes(files[1].read_bytes()[:-1])
    distributed.barrier()
    assert load_checkpoint(folder / "of-two-0", policy.transformer, optimizer) == {"step": 2}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory, shared_tiny_model, tiny_records, random_pairs, asked):
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("steps")
    (folder / "model").mkdir()
    shared_tiny_model.save(folder / "model")
    pairs = random_pairs(shared_tiny_model, 7, ("both", "generation", "understanding"), asked)
    pq.write_table(pairs, folder / "pairs.parquet")
    write_records(folder / "records.parquet", tiny_records)
    policy, optimizer = trained(load_model(str(folder / "model")))
    save_checkpoint(folder / "of-one", policy.transformer, optimizer, {"step": 2}, 2)
    finish(launch(__file__, folder))
    return folder


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_the_same(of_two, name):
    import pyarrow.parquet as pq

    count, settings = STEPS[name]
    pairs = pq.read_table(of_two / "pairs.parquet").slice(0, count)
    metrics, gradients = step_of(load_model(str(of_two / "model")), pairs, TrainConfig(dtype="float32", **settings))
    metrics_of_two, gradients_of_two = torch.load(of_two / f"{name}.pt", weights_only=True)
    assert metrics_of_two == pytest.approx(metrics, rel=1e-5, abs=1e-5)
    assert gradients.keys() == gradients_of_two.keys()
    for parameter, gradient in gradients.items():
        assert gradient.abs().max() > 0 or "lora_A" in parameter, parameter
        torch.testing.assert_close(gradients_of_two[parameter], gradient, rtol=1e-5, atol=1e-5)


def test_a_step_of_grpo_is_the_same(of_two):
    """Each process draws and judges its share of the prompts, with whole weights; the passes are shared out after."""
    records = list(RecordFile(of_two / "records.parquet"))
    metrics, gradients = grpo_step_of(load_model(str(of_two / "model")), records)
    metrics_of_two, gradients_of_two = torch.load(of_two / "grpo.pt", weights_only=True)
    assert metrics_of_two == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    assert metrics["reward_std"] > 0 and metrics["clipped"] > 0
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradients_of_two[parameter], gradient, rtol=1e-4, atol=1e-5)


def test_two_processes_go_on_from_one(of_two):
    policy, optimizer = trained(load_model(str(of_two / "model")))
    take_step(policy, optimizer)
    resumed = torch.load(of_two / "resumed.pt", weights_only=True)
    for name, value in policy.transformer.named_parameters():
        assert torch.equal(resumed[name], value), name


# One process holds nothing of an adapter of rank 1.
@pytest.mark.parametrize("lora_rank", [0, 1], ids=["all weights", "adapters"])
def test_one_process_goes_on_from_two(of_two, lora_rank):
    policy, optimizer = trained(load_model(str(of_two / "model")), lora_rank)
    other, other_optimizer = untrained(load_model(str(of_two / "model")), lora_rank)
    path = of_two / f"of-two-{lora_rank}"
    assert load_checkpoint(path, other.transformer, other_optimizer) == {"step": 2}
    for item in ((policy, optimizer), (other, other_optimizer)):
        take_step(*item)
    weights = dict(other.transformer.named_parameters())
    for name, value in policy.transformer.named_parameters():
        assert torch.equal(weights[name], value), name


# Whole runs.


def arguments(model, folder, *more):
    settings = (*SETTINGS, f"model.name={model}", f"run.folder={folder}", *more)
    return [item for setting in settings for item in ("--set", setting)]


@pytest.fixture(scope="module")
def model_folder(shared_tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    shared_tiny_model.save(folder)
    return folder


@pytest.fixture(scope="module")
def of_one_run(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run_selfplay(load_config(None, arguments(model_folder, folder)[1::2]))
    return folder / "t"


def assert_same_run(folder, expected):
    """To rounding where the sums of training are taken in another order."""
    for name in ("records.parquet", "round-1/pairs.parquet", "round-1/rejected.parquet"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    for path in sorted((expected / "round-1/candidates").iterdir()):
        assert (folder / "round-1/candidates" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not [path for path in folder.rglob(".*") if path.name != ".lock"]
    one, other = (json.loads((path / "summary.json").read_text()) for path in (expected, folder))
    assert other["before"].keys() == one["before"].keys()
    assert other["rounds"][0]["pairs"] == one["rounds"][0]["pairs"]
    assert other["rounds"][0]["training"] == pytest.approx(one["rounds"][0]["training"], rel=1e-5, abs=1e-5)
    assert set(other["rounds"][0]["seconds"]) == {"curation", "training", "evaluation"}
    weights = [load_model(str(path / "round-1/model")).transformer.state_dict() for path in (expected, folder)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5)


def test_a_run_is_the_same(model_folder, of_one_run, tmp_path):
    stdout, stderr = finish(launch("-m", "hermesflow", "selfplay", *arguments(model_folder, tmp_path), "-v"))
    assert_same_run(tmp_path / "t", of_one_run)
    assert stdout.count("report: ") == 1 and stdout.count("settings: ") == 1
    assert len(own_lines(stderr)) == 4  # how much each of two models takes in a pass, images and text
    assert "Traceback" not in stderr


def kill_a_process(launcher, folder, pattern, number):
    """SIGKILL to one of the launcher's processes as soon as there is a file; returns stderr."""
    while launcher.poll() is None and not list(folder.rglob(pattern)):
        time.sleep(0.005)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if b"RANK=%d" % number in environment:
            os.kill(int(child), signal.SIGKILL)
    return finish(launcher, code=1)[1]


def test_a_killed_process_ends_the_run_with_one_line_and_it_goes_on(model_folder, of_one_run, tmp_path):
    command = ("-m", "hermesflow", "selfplay", *arguments(model_folder, tmp_path))
    for number, pattern in ((1, "candidates/part-00000.parquet"), (0, "train/step-000002/manifest.json")):
        stderr = kill_a_process(launch(*command), tmp_path, pattern, number)
        words = [line for line in own_lines(stderr) if "error" in line]
        assert len(words) == 1 and "the same command resumes where the run stopped" in words[0], stderr
        assert re.search("another process of this run is gone|stopped by torchrun", words[0])
        ours = [line for line in stderr.splitlines() if "/hermesflow/" in line and line.lstrip().startswith("File ")]
        assert not ours, stderr
        assert not (tmp_path / "t/summary.json").exists()
    run_selfplay(load_config(None, arguments(model_folder, tmp_path)[1::2]))
    assert_same_run(tmp_path / "t", of_one_run)


def test_torchrun_is_told_to_end(model_folder, tmp_path):
    launcher = launch("-m", "hermesflow", "curate", *arguments(model_folder, tmp_path, "data.num_records=500"))
    while launcher.poll() is None and not list(tmp_path.rglob("part-00001.parquet")):
        time.sleep(0.01)
    launcher.terminate()
    _, stderr = finish(launcher, code=1)
    (line,) = [line for line in own_lines(stderr) if "error" in line]
    assert "stopped by torchrun, since another process is gone or the run was asked to end; the same command" in line


def score_badly(candidates, truths):
    """A scorer of the user's."""
    if rank() == 1:
        raise ValueError("of process 1")
    return [0.5] * len(candidates)


MISTAKES = {
    "of all": (["--set", "model.device=cuda:0"], "model.device cuda:0: all processes would share it"),
    "of one": (["--set", "curation.caption_scorer=test_distributed:score_badly"], "score_badly: raised ValueError"),
    "of the first": (["--set", "data.source=/nowhere"], "/nowhere"),
}


@pytest.mark.parametrize("more, words", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_told_once(model_folder, tmp_path, more, words):
    command = ("-m", "hermesflow", "curate", *arguments(model_folder, tmp_path), *more)
    _, stderr = finish(launch(*command), code=1)
    (line,) = [line for line in own_lines(stderr) if "error" in line]
    assert re.search(words, line) and "hermesflow/cli.py" not in stderr


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_process_group_of_the_caller_is_left_alone(tiny_model, is_ours):
    if not is_ours:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    shard(tiny_model.transformer, torch.bfloat16)
    assert torch.distributed.is_initialized()
    tiny_model.transformer = unshard(tiny_model.transformer)
    assert torch.distributed.is_initialized() != is_ours


DEVICES = {
    "alone, auto": (1, "auto", 0, "cpu"),
    "alone, cuda": (1, "cuda", 1, "cuda"),
    "auto, no GPU": (2, "auto", 0, "cpu"),
    "auto": (2, "auto", 4, "cuda:3"),
    "cuda": (2, "cuda", 4, "cuda:3"),
    "cpu": (2, "cpu", 4, "cpu"),
}


@pytest.mark.parametrize("processes, device, count, expected", DEVICES.values(), ids=DEVICES.keys())
def test_each_process_has_its_own_device(monkeypatch, processes, device, count, expected):
    as_process_three(monkeypatch, processes, count)
    assert local_device(device) == expected


REFUSED_DEVICES = {
    "one for all": (2, "cuda:1", "cuda:1: all processes would share it; set it to cuda"),
    "too many processes": (2, "cuda", "process 3 of this machine has no CUDA device, torch sees 2; give --nproc-per-"),
    "alone": (1, "cuda:2", "model.device cuda:2: torch sees 2 CUDA devices here; choose another, or cpu"),
}


@pytest.mark.parametrize("processes, device, message", REFUSED_DEVICES.values(), ids=REFUSED_DEVICES.keys())
def test_a_device_that_a_process_cannot_have_is_refused(monkeypatch, processes, device, message):
    as_process_three(monkeypatch, processes, 2)
    with pytest.raises(InputError, match=message):
        open_model(ModelConfig(device=device))


def as_process_three(monkeypatch, processes, count):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize("processes", [1, 2])
def test_one_of_several_processes_ends_before_its_interpreter_is_taken_down(processes):
    """gloo's threads may still need the interpreter then, and would abort the process."""
    code = (
        "import atexit, runpy, sys; atexit.register(print, 'taken down'); "
        "sys.argv = ['hermesflow', 'train', '--pairs', 'none', '--round', '1']; "
        "runpy.run_module('hermesflow', run_name='__main__')"
    )
    environment = os.environ | {"WORLD_SIZE": str(processes)}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and own_lines(done.stderr)
    assert ("taken down" in done.stdout) == (processes == 1)


# evaluations


class Own(Evaluation):
    """Of the user's, measured as a whole."""

    def measure(self, model, config):
        return [{"id": str(number), "scores": {"right": (number, 4)}, "of": rank()} for number in range(4)]


OWN = Own()


def measured_run(model, folder, *more):
    """Before self-play: 190 records in three parts."""
    sizes = ("eval.num_prompts=70", "eval.num_understanding=190", "eval.images_per_prompt=2", "eval.samplers=['2/0.7']")
    return arguments(model, folder, *sizes, *more)


def evaluate_in_a_process(model, folder):
    """A run's evaluation, one that no run keeps, and one of the user's."""
    config = load_config(None, measured_run(model, folder)[1::2])
    evaluate_round(Run(config), 0)
    found = evaluate(open_model(config.model), config.drawn_by(config.eval))
    on_main(lambda: write_json(folder / "found.json", found))
    own = ("run.name=own", "eval.suite=test_distributed:OWN")
    evaluate_round(Run(load_config(None, measured_run(model, folder, *own)[1::2])), 0)


@pytest.fixture(scope="module")
def measured_by_one(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        evaluate_in_a_process(model_folder, folder)
    return folder


def files_of_evaluations(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.json") if path.name in EVALUATED}


EVALUATED = ("evaluation.json", "found.json")


def test_two_processes_of_which_one_is_killed_measure_what_one_does(model_folder, measured_by_one, tmp_path):
    command = (__file__, model_folder, tmp_path)
    kill_a_process(launch(*command), tmp_path, "t/round-0/evaluation/part-00000.json", 0)
    assert not (tmp_path / "t/round-0/evaluation.json").exists()
    finish(launch(*command))
    expected = files_of_evaluations(measured_by_one)
    assert files_of_evaluations(tmp_path) == expected and len(expected) == 3
    assert not list(tmp_path.glob("*/round-0/evaluation"))
    result, found = (json.loads((tmp_path / name).read_text()) for name in ("t/round-0/evaluation.json", "found.json"))
    assert result == found and len(result["records"]) == 190
    own = json.loads((tmp_path / "own/round-0/evaluation.json").read_text())
    assert own["metrics"]["right"] == 6 / 16 and [row["of"] for row in own["records"]] == [0] * 4


def test_two_processes_measure_without_a_run(model_folder, measured_by_one, tmp_path):
    command = ("eval", *measured_run(model_folder, tmp_path), "-o", tmp_path / "of-two.json")
    stdout, _ = finish(launch("-m", "hermesflow", *command))
    found = json.loads((tmp_path / "of-two.json").read_text())
    assert found == {"model": str(model_folder)} | json.loads((measured_by_one / "found.json").read_text())
    assert stdout.count("evaluation: ") == 1


def test_a_killed_evaluation_resumes_after_its_last_part(model_folder, measured_by_one, tmp_path, monkeypatch):
    config = load_config(None, measured_run(model_folder, tmp_path)[1::2])
    measured, measure = [], builtin._measure

    def kill_the_third(*options):
        measured.append(options[2])
        if measured == [0, 64, 128]:
            raise KeyboardInterrupt
        return measure(*options)

    monkeypatch.setattr(builtin, "_measure", kill_the_third)
    with pytest.raises(KeyboardInterrupt):
        evaluate_round(Run(config), 0)
    other = measured_run(model_folder, tmp_path, "eval.seed=5")[1::2]
    with pytest.raises(InputError, match=r"the run has other settings \(eval.seed\)"):
        Run(load_config(None, other))
    evaluate_round(Run(config), 0)
    assert measured == [0, 64, 128, 128]
    path = Path("t/round-0/evaluation.json")
    assert (tmp_path / path).read_bytes() == (measured_by_one / path).read_bytes()


def test_a_part_of_other_weights_is_not_taken(model_folder, tmp_path):
    run = Run(load_config(None, measured_run(model_folder, tmp_path)[1::2]))
    path = run.path(0, "evaluation", "part-00000.json")
    write_json(path, {"model": "other", "records": []})
    with pytest.raises(
        InputError, match="part-00000.json: was measured of other weights; delete .*round-0/evaluation "
    ):
        evaluate_round(run, 0)
    write_json(path, [])
    with pytest.raises(InputError, match="part-00000.json: damaged evaluation file"):
        evaluate_round(run, 0)


if __name__ == "__main__":
    with process_group("cpu"):
        (evaluate_in_a_process if len(sys.argv) > 2 else work_of_a_process)(*map(Path, sys.argv[1:]))


# suites


def files_below(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_processes_draw_a_suite_as_one_does(tmp_path):
    """And what a kill leaves is gone on with; the prompts of each process are its own."""
    wanted = {"tag": "counting", "include": [{"class": "circle", "count": 2}]}
    lines = [wanted | {"prompt": f"{count} red circles"} for count in ("two", "three") * 6]
    prompts = tmp_path / "evaluation_metadata.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ("eval", "--suite", "geneval", "--prompts", prompts, "--model", "tiny", "-o")
    assert main([*map(str, command), str(tmp_path / "one")]) == 0
    launcher = launch("-m", "hermesflow", *command, tmp_path / "two")
    while launcher.poll() is None and not list((tmp_path / "two").rglob("*.png")):
        time.sleep(0.01)
    launcher.terminate()
    launcher.communicate(timeout=120)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").rglob("*.png")}
    finish(launch("-m", "hermesflow", *command, tmp_path / "two"))
    assert files_below(tmp_path / "two") == files_below(tmp_path / "one")
    assert kept and all(path.stat().st_mtime_ns == when for path, when in kept.items())


# workers

WORKER = (
    "import hermesflow.runtime.claims as c; c.GONE_AFTER = 3; from hermesflow.cli import main; raise SystemExit(main())"
)


def start_worker(*command):
    """One that is taken for gone after three seconds."""
    return subprocess.Popen(
        [sys.executable, "-P", "-c", WORKER, *map(str, command), "--worker"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONSAFEPATH": "1"},
    )  # fmt: skip


def test_workers_of_which_one_is_killed_and_one_joins_late_make_what_one_process_makes(model_folder, tmp_path):
    """The workers share the records too, which one of them makes."""
    more = ("data.num_records=24", "curation.batch_records=2")
    for folder in ("one", "many"):
        (tmp_path / folder).mkdir()
    assert main(["curate", *arguments(model_folder, tmp_path / "one", *more)]) == 0
    command = ("curate", *arguments(model_folder, tmp_path / "many", *more))
    first, second = start_worker(*command), start_worker(*command)
    while first.poll() is None and not list((tmp_path / "many").rglob("part-00001.parquet")):
        time.sleep(0.01)
    first.kill()
    third = start_worker(*command)
    for worker in (second, third):
        _, stderr = worker.communicate(timeout=120)
        assert worker.returncode == 0, stderr
    first.communicate()
    parts = tmp_path / "many/t/round-1/candidates"
    assert len(list(parts.glob("part-*.parquet"))) == 12 and not (parts.parent / "pairs.parquet").exists()
    assert main(list(command)) == 0
    found, expected = (files_below(tmp_path / name / "t") for name in ("many", "one"))
    own = {Path("config.toml"), Path("round-1/seconds.json")}
    assert {path: data for path, data in found.items() if path not in own} == {
        path: data for path, data in expected.items() if path not in own
    }


def test_a_worker_is_told_what_it_cannot_work_on(model_folder, tmp_path, capsys):
    command = ["curate", *arguments(model_folder, tmp_path, "data.num_records=4")]
    assert main([*command, "--worker"]) == 0 and "without --worker makes the pairs" in capsys.readouterr().out
    assert main([*command, "--worker"]) == 0  # nothing is left to make
    assert main([*command, "--set", "curation.num_images=2", "--worker"]) == 2
    assert "the run has other settings (curation.num_images)" in capsys.readouterr().err
    assert main([*command, "--worker", "--round", "2"]) == 2
    assert "round 2: the run has rounds 1 to 1" in capsys.readouterr().err


def test_workers_of_which_one_is_killed_measure_what_one_process_does(model_folder, measured_by_one, tmp_path, capsys):
    command = measured_run(model_folder, tmp_path)
    first, second = (start_worker("eval", *command, "--round", 0) for _ in range(2))
    while first.poll() is None and not list(tmp_path.rglob("part-00000.json")):
        time.sleep(0.005)
    first.kill()
    stdout, stderr = second.communicate(timeout=120)
    first.communicate()
    assert second.returncode == 0 and "selfplay with the same settings takes it from there" in stdout, stderr
    parts = sorted((tmp_path / "t/round-0/evaluation").iterdir())
    assert [path.name for path in parts] == [f"part-{number:05d}.json" for number in range(3)]
    evaluate_round(Run(load_config(None, command[1::2])), 0)
    path = Path("t/round-0/evaluation.json")
    assert (tmp_path / path).read_bytes() == (measured_by_one / path).read_bytes() and not parts[0].exists()
    assert main(["eval", *command, "--worker"]) == 0  # nothing is left to measure
    assert main(["eval", *command, "--worker", "--round", "1"]) == 2
    assert "round 1 is not trained yet; run it first" in capsys.readouterr().err
    assert main(["eval", *command, "--worker", "--round", "2"]) == 2
    assert "round 2: the run has rounds 1 to 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--round", "1"], "--round: belongs to --worker"),
        (["--worker", "-o", "x.json"], "--output: not with --worker"),
        (["--worker", "--suite", "geneval"], "--suite: not with --worker"),
    ],
)
def test_options_that_do_not_belong_to_a_worker_of_evaluation(capsys, options, message):
    assert main(["eval", *options]) == 2 and message in capsys.readouterr().err


def test_torchrun_starts_no_worker(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--worker: a worker is one process; start each by itself, without torchrun"):
        Run(load_config(None, [f"run.folder={tmp_path}"]), as_worker=True)
