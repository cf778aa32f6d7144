"""A process in which Triton interprets kernels, so that they can be checked where there is no GPU.

`TRITON_INTERPRET` counts only before Triton is imported, and some library may have imported it here already. So the
kernels run in a process of their own, started by the first test that asks, and the tests stay ordinary tests.
"""

from __future__ import annotations

import multiprocessing
import site
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
Interpreter = Callable[..., Any]


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """Call a function of an importable module under Triton's interpreter: `interpreter(function, *args)`."""
    pytest.importorskip("triton")
    from tests.kernels import interpreted

    # last on the path, so that our folder `kernels` hides no package of that name
    start: dict[str, Any] = {"initializer": site.addsitedir, "initargs": (str(ROOT),)}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), **start) as pool:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("TRITON_INTERPRET", "1")
            pool.submit(int).result()  # starts the process

        def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return pool.submit(function, *args, **kwargs).result(timeout=120)

        assert call(interpreted.is_interpreting), "Triton was imported before it was told to interpret"
        yield call
