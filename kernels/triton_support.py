"""Triton where it is installed; a clear error, when a kernel is launched and not before, where it is not.

It knows nothing about any kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

try:
    import triton
    import triton.language as tl
    from triton import knobs
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    triton = tl = knobs = None

INTERPRETED = triton is not None and bool(knobs.runtime.interpret)
"""Whether kernels run on the CPU, in Triton's interpreter; what they were made for counts, not what is set later."""

__all__ = ["constant", "jit", "require_device", "tl"]


class MissingKernel:
    """Stands for a kernel on a machine without Triton."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = function.__name__

    def __getitem__(self, grid: object) -> NoReturn:
        raise ModuleNotFoundError(
            f"{self.name} needs Triton, which is not installed: `pip install 'mmextract[triton]'` (Linux only), "
            "or use the same operation from mmextract.kernels.reference",
            name="triton",
        )


def jit(function: Callable[..., Any]) -> Any:
    """Return `function` as a Triton kernel, or as a stand-in that says what is missing when launched."""
    return MissingKernel(function) if triton is None else triton.jit(function)


def constant(value: int) -> Any:
    """Return a number that kernels may use although it is defined outside of them."""
    return value if triton is None else tl.constexpr(value)


def require_device(*tensors: torch.Tensor) -> None:
    """Raise ValueError unless all tensors lie, contiguous, on one device that a kernel can run on."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"kernels need all tensors on one device, got {sorted(map(str, devices))}")
    strided = [tuple(tensor.shape) for tensor in tensors if not tensor.is_contiguous()]
    if strided:
        raise ValueError(f"kernels need contiguous tensors, got strided ones of shapes {strided}")
    if triton is not None and devices == {torch.device("cpu")} and not INTERPRETED:
        raise ValueError(
            "kernels run on a GPU, got tensors on the CPU: move them, set TRITON_INTERPRET=1 before Triton is "
            "imported to debug, or use mmextract.kernels.reference"
        )
