"""The shape of the project: who may import whom, and that our `kernels` never shadows Hugging Face's."""

from __future__ import annotations

import ast
import importlib.util
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "kernels": {"kernels"},
    "engine": {"engine", "kernels"},
    # a store's states; where tasks may run, and on whom
    "probes": {"probes", "engine.store", "engine.cluster", "engine.versions"},
    "cli": {"cli", "engine", "kernels", "probes"},
}
EXPERIMENT = {"engine.experiment", "engine.steps", "engine.rows", "engine.identities"}
"""What `probes/experiment_*.py` may import besides: the plan whose states they probe, and who is on which image."""


def imported_modules(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_downwards(package: str) -> None:
    parents = {"mmextract", "mmextract.engine"}  # of `from mmextract.engine import store`
    for file in (ROOT / package).rglob("*.py"):
        of_experiment = package == "probes" and file.name.startswith("experiment_")
        names = MAY_IMPORT[package] | (EXPERIMENT if of_experiment else set())
        allowed = {f"mmextract.{name}" for name in names}
        for module in imported_modules(file):
            if module.startswith("mmextract") and module not in parents:
                assert any(module == name or module.startswith(f"{name}.") for name in allowed), (
                    f"{file}: {module}"
                )


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_module_is_imported_by_its_folder_name(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        assert not {module.partition(".")[0] for module in imported_modules(file)} & set(MAY_IMPORT), file


def test_the_top_level_name_kernels_is_not_ours() -> None:
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT)


def test_every_package_is_installed() -> None:
    declared = (ROOT / "pyproject.toml").read_text("utf-8")
    for folder in MAY_IMPORT:
        for init in (ROOT / folder).rglob("__init__.py"):
            package = ".".join(("mmextract", *init.parent.relative_to(ROOT).parts))
            assert f'"{package}"' in declared, f"{package} is missing from [tool.setuptools] packages"


def test_help_does_not_load_the_heavy_libraries() -> None:
    script = (
        "import sys; sys.argv = ['mmextract', '--help']\n"
        "from mmextract.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'dask', 'sklearn', 'zarr', 'numpy', 'matplotlib', 'pyarrow'}\n"
        "sys.exit(repr(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "dump" in done.stdout


def test_help_answers_at_once() -> None:
    python, script = sys.executable, str(Path(sys.executable).parent / "mmextract")
    # a machine may be slow: what the library takes that draws the help is the measure
    library = [python, "-c", "import rich_click"]
    assert _least_processor_time([script, "--help"]) < 5 * _least_processor_time(library)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, mmextract.cli.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "numpy", "dask", "distributed", "zarr", "PIL", "sklearn", "matplotlib"}
    assert not heavy & set(done.stdout.split())


def _least_processor_time(command: list[str]) -> float:
    """Return seconds, the least of five: a busy machine does not add to processor time, and noise only ever does."""
    subprocess.run(command, capture_output=True, check=True)  # compiles what is not compiled yet
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(seconds)
