"""What several tests share."""

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def naive():
    """The truth that the engine is held to, engine/naive.py, which lies in no package."""
    spec = importlib.util.spec_from_file_location("engine_naive", Path(__file__).parent / "engine" / "naive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def full_disk(tmp_path):
    """A folder on a file system of 64 KiB, all of it in use; needs the right to mount one."""
    folder = tmp_path / "full-disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "hermesflow-test", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("cannot make a small disk: there is no mount command")
    if done.returncode:
        pytest.skip(f"cannot make a small disk: {done.stderr.strip()}")
    try:
        with pytest.raises(OSError), (folder / "filling").open("wb", buffering=0) as filling:
            while True:
                filling.write(bytes(4096))
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def no_folder(tmp_path):
    """A path that cannot become a folder, for root neither: it lies below a regular file."""
    blocker = tmp_path / "a-file"
    blocker.touch()
    return blocker / "folder"


@pytest.fixture(autouse=True)
def _no_backend_chosen(monkeypatch):
    """A backend or debug mode that the developer's shell asks for must not change what the tests test."""
    for name in [name for name in os.environ if name.startswith("HERMESFLOW_")]:
        monkeypatch.delenv(name)
