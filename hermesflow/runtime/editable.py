"""Lists benchmarks, engine and kernels among the package's modules in an editable install.

There setup.py maps folders beside the package: import finds them, pkgutil.walk_packages(hermesflow.__path__) would not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

_BESIDE = ("benchmarks", "engine", "kernels")


def list_folders_beside(path: list[str]) -> None:
    """Adds to the package's __path__ an entry that lists them, where they do not lie inside the package."""
    package = Path(__file__).parents[1]
    entry = str(package / "beside")  # no such folder
    if not (package / "kernels").is_dir() and entry not in path:
        sys.path_importer_cache[entry] = _Beside(package.parent)
        path.append(entry)


class _Beside:
    """A path entry finder that lists and finds nothing else."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def iter_modules(self, prefix: str = "") -> Iterator[tuple[str, bool]]:
        """For pkgutil: (name, is it a package)."""
        return ((prefix + name, True) for name in _BESIDE if (self._folder / name / "__init__.py").is_file())

    def find_spec(self, name: str, target: object = None) -> None:
        """For import, which asks the editable install's own finder next."""
