"""The layers: benchmarks, hermesflow, engine, kernels, each importing downward only; read from the source, not run."""

import ast
from pathlib import Path

import pytest

from hermesflow.kernels import OPS, registry

ROOT = Path(__file__).parents[1]
# folder -> (name when installed, packages of this project that it may import)
LAYERS = {
    "kernels": ("hermesflow.kernels", ("hermesflow.kernels",)),
    "engine": ("hermesflow.engine", ("hermesflow.engine", "hermesflow.kernels")),
    "hermesflow": ("hermesflow", ("hermesflow",)),
    "benchmarks": ("hermesflow.benchmarks", ("hermesflow",)),
}
FLOORS = (
    "runtime", "config", "models", "data tasks drop_in", "scoring", "algorithms", "worlds curation training",
    "evaluation", "runs report serving", "selfplay", "arguments", "cli",
)  # fmt: skip
"""Rooms and files of hermesflow/, from the ground up; those of one floor know nothing of one another."""
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
OUTSIDE = {"__init__", "__main__", "adapters", "functional"}
"""Of the files of hermesflow/: the door, and names that are kept for users."""
FILES = [(folder, path) for folder in LAYERS for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_modules(path: Path, package: str) -> set[str]:
    """Every module that a file imports, at whatever depth; relative names are resolved against its package.

    What stands under `if TYPE_CHECKING:` counts too: it ties the files to a reader as any other import does.
    """
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            modules.update({module} if node.module else {f"{module}.{alias.name}" for alias in node.names})
            if module == "hermesflow":  # from hermesflow import engine
                modules.update(f"hermesflow.{alias.name}" for alias in node.names)
    return modules


def package_of(folder: str, path: Path) -> str:
    inner = path.parent.relative_to(ROOT / folder).parts
    return ".".join([LAYERS[folder][0], *inner])


def file_id(case: object) -> str:
    return str(case.relative_to(ROOT)) if isinstance(case, Path) else ""


@pytest.mark.parametrize(("folder", "path"), FILES, ids=file_id)
def test_imports_only_downward(folder: str, path: Path) -> None:
    name, allowed = LAYERS[folder]
    upward = [
        module
        for module in imported_modules(path, package_of(folder, path))
        if module.partition(".")[0] in {"hermesflow", "engine", "kernels", "benchmarks", "tests"}
        and not any(module == layer or module.startswith(f"{layer}.") for layer in allowed)
    ]
    assert not upward, f"{path.relative_to(ROOT)} ({name}) may import {', '.join(allowed)}, but imports {upward}"


def room_of(module: str) -> str:
    """The room of hermesflow/ that a module lies in, such as "models"; "" for the layers below."""
    name = module.split(".")[1] if module.startswith("hermesflow.") else ""
    return "" if name in ("engine", "kernels", "benchmarks", "__version__") else name


def module_of(folder: str, path: Path) -> str:
    parts = [*package_of(folder, path).split("."), path.stem]
    return ".".join(parts[:-1] if path.stem == "__init__" else parts)


@pytest.mark.parametrize("path", [path for folder, path in FILES if folder == "hermesflow"], ids=file_id)
def test_rooms_import_only_rooms_below(path: Path) -> None:
    room = room_of(module_of("hermesflow", path)) or "__init__"
    if room in OUTSIDE:
        return
    assert room in FLOOR_OF, f"{room} stands on no floor; give it one in FLOORS"
    others = {room_of(module): module for module in imported_modules(path, package_of("hermesflow", path))}
    wrong = [
        module
        for other, module in others.items()
        if other not in ("", room) and FLOOR_OF.get(other, len(FLOORS)) >= FLOOR_OF[room]
    ]
    assert not wrong, f"{path.relative_to(ROOT)} is on the floor of {FLOORS[FLOOR_OF[room]]}, but imports {wrong}"


def test_no_imports_go_in_a_circle() -> None:
    modules = {module_of(folder, path): (folder, path) for folder, path in FILES}
    names = {name: named_modules(path, package_of(folder, path)) for name, (folder, path) in modules.items()}
    left = {name: {other for other in named if other in modules and other != name} for name, named in names.items()}
    while free := [name for name, named in left.items() if not named]:
        left = {name: named - set(free) for name, named in left.items() if name not in free}
    assert not left, f"these import one another: {sorted(left)}"


def named_modules(path: Path, package: str) -> set[str]:
    """imported_modules, with a module named by `from package import module` as itself."""
    found = imported_modules(path, package)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            known = {
                name
                for name in inner
                if (ROOT / Path(*name.split(".")[1:])).with_suffix(".py").exists()
                or (ROOT / "hermesflow" / Path(*name.split(".")[1:])).with_suffix(".py").exists()
            }
            found = found - {node.module} | known if known == inner else found | known
    return found


def test_the_house_stays_small() -> None:
    """A newcomer sees the rooms at a glance, and reads the loop in one sitting."""
    assert len(list((ROOT / "hermesflow").glob("*.py"))) <= 12
    assert len((ROOT / "hermesflow" / "selfplay.py").read_text(encoding="utf-8").splitlines()) <= 135
    assert len((ROOT / "hermesflow" / "cli.py").read_text(encoding="utf-8").splitlines()) < 450


@pytest.mark.parametrize("path", [path for folder, path in FILES if folder == "hermesflow"], ids=file_id)
def test_only_the_command_line_knows_the_benchmarks(path: Path) -> None:
    if path.name != "cli.py":
        upward = [name for name in imported_modules(path, "hermesflow") if name.startswith("hermesflow.benchmarks")]
        assert not upward, f"{path.name} imports {upward}"


@pytest.mark.parametrize("path", [path for folder, path in FILES if folder == "kernels"], ids=file_id)
def test_triton_is_imported_by_triton_files_only(path: Path) -> None:
    if path.stem.endswith("_triton"):
        return
    modules = imported_modules(path, "hermesflow.kernels")
    triton = [module for module in modules if module.split(".")[0] == "triton" or module.endswith("_triton")]
    assert not triton, f"{path.name} is loaded without Triton; register its Triton backend by name instead of {triton}"


@pytest.mark.parametrize("path", [path for folder, path in FILES if folder == "kernels"], ids=file_id)
def test_backends_do_not_import_one_another(path: Path) -> None:
    registry.backends()  # registers all
    targets = [backend.target for of_op in registry._registered.values() for backend in of_op.values()]
    backends = {target.partition(":")[0] for target in targets} - {f"hermesflow.kernels.{op}" for op in OPS}
    if module_of("kernels", path) in backends - {"hermesflow.kernels.extension_ops"}:
        others = imported_modules(path, "hermesflow.kernels") & backends - {"hermesflow.kernels.extension_ops"}
        assert not others, f"{path.name} imports {others}"


@pytest.mark.parametrize("folder", LAYERS)
def test_no_package_exports_a_function_named_like_its_module(folder: str) -> None:
    """Such an export gives the function once, and the module after the next import.

    An op lies in a file of its own name, as kernels/mask_topk.py; the package must not export it.
    """
    for init in (ROOT / folder).rglob("__init__.py"):
        modules = {path.stem for path in init.parent.glob("*.py")} | {path.name for path in init.parent.iterdir()}
        tree = ast.parse(init.read_text(encoding="utf-8"))
        names = {
            alias.asname or alias.name
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if node.module
        }
        names |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        names |= {
            key.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Dict)
            for key in node.keys
            if isinstance(key, ast.Constant)
        }
        assert not names & modules, f"{init.relative_to(ROOT)} exports {names & modules}, which are modules too"


def test_no_module_shares_a_public_functions_name() -> None:
    """Outside the ops, whose files carry the op's name, one name means one thing."""
    modules = {path.stem: path for folder, path in FILES if folder != "kernels"}
    for folder, path in FILES:
        if folder == "kernels":
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.name not in OPS:
                assert node.name not in modules, (
                    f"{path.name} defines {node.name}(), a module too: {modules[node.name]}"
                )


def test_reader_sees_imports_at_any_depth(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        "import a.b\n"
        "if TYPE_CHECKING:\n    import up\n"
        "def f():\n    from .c import d\n    from . import e\n    from ..g import h\n"
    )
    assert imported_modules(source, "hermesflow.engine") == {
        "a.b",
        "up",
        "hermesflow.engine.c",
        "hermesflow.engine.e",
        "hermesflow.g",
    }
