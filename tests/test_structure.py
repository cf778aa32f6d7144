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
    "probes": {"probes", "engine.store"},
    "cli": {"cli", "engine", "kernels", "probes"},
}


def imported_modules(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_downwards(package: str) -> None:
    allowed = {f"mmextract.{name}" for name in MAY_IMPORT[package]}
    parents = {"mmextract", "mmextract.engine"}  # of `from mmextract.engine import store`
    for file in (ROOT / package).rglob("*.py"):
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
    command = [str(Path(sys.executable).parent / "mmextract"), "--help"]
    subprocess.run(command, capture_output=True, check=True)  # compiles what is not compiled yet
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # processor time, so that a busy machine does not fail it
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(seconds) < 0.3
