"""The real Ray on this machine's loopback makes the candidates of one process; a killed task is done again."""

import os
import secrets
import subprocess
import sys
from importlib.util import find_spec

import pytest

from hermesflow.cli import main
from hermesflow.config import load_config
from hermesflow.runs import Run
from hermesflow.runs.ray_driver import share_by_ray
from hermesflow.runtime.files import InputError

SETTINGS = (
    "model.name=model", "model.device=cpu", "data.num_records=6", "curation.num_images=2", "curation.num_steps=2",
    "curation.threshold=0", "curation.margin=0", "curation.keep=any", "curation.batch_records=2",
    "curation.caption_top_k=[4]", "curation.caption_scorer=lethal_scorer:score", "run.name=t",
)  # fmt: skip
SCORER = """
import os, pathlib, signal

def score(captions, truth):
    mark = pathlib.Path(os.environ["KILLED"])
    if not mark.exists():
        mark.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(caption)) for caption in captions]
"""
ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the name under which Ray stays on the loopback
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1",
}  # fmt: skip


@pytest.mark.skipif(find_spec("ray") is None, reason="needs ray")
def test_tasks_of_which_one_is_killed_make_what_one_process_makes(shared_tiny_model, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    shared_tiny_model.save(tmp_path / "model")
    (tmp_path / "lethal_scorer.py").write_text(SCORER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KILLED", str(tmp_path / "model"))  # nobody is
    assert main(["curate", *SETTINGS, "run.folder=one"]) == 0
    killed = tmp_path / "killed"
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-P", "-m", "hermesflow", "curate", *SETTINGS, "run.folder=by-ray", "--ray"],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": path, "KILLED": killed, "RAY_AUTH_TOKEN": secrets.token_hex(32)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "all are there; the same command without --ray makes the pairs" in done.stdout
    assert int(killed.read_text()) != os.getpid()
    assert main(["curate", *SETTINGS, "run.folder=by-ray"]) == 0
    one, other = (
        {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.parquet")}
        for folder in (tmp_path / "one", tmp_path / "by-ray")
    )
    assert one == other and len(one) == 7


def test_what_ray_cannot_do_is_told(tmp_path, monkeypatch):
    run = Run(load_config(None, [f"run.folder={tmp_path}", "model.device=cuda:1"]), as_worker=True)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"--ray: needs the package ray; pip install 'hermesflow\[ray\]'"):
        share_by_ray(run, 1)
    monkeypatch.setitem(sys.modules, "ray", sys)
    with pytest.raises(InputError, match="model.device cuda:1: all tasks would share it; set it to cuda"):
        share_by_ray(run, 1)
    with pytest.raises(InputError, match="round 4: the run has rounds 1 to 3"):
        share_by_ray(run, 4)
