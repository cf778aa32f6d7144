"""Fixed-point tables for resizing uint8 images exactly as Pillow and torchvision do on a CPU.

One table says, for one axis, which source pixels an output pixel is a weighted sum of and with which integer weights.
A resize is two of them, one after the other, with a uint8 image in between; `vertical_first` says which is first.
Once the tables are there nothing is left of filters and libraries: every path runs the same integer sums.

It knows nothing about images, watermarks, devices or processors, and needs nothing but NumPy.

Sources: Pillow `src/libImaging/Resample.c` (`precompute_coeffs`, `normalize_coeffs_8bpc`, `ImagingResample`) and
`Geometry.c` (`ImagingScaleAffine`) for `nearest`; PyTorch `aten/src/ATen/native/cpu/UpSampleKernel.cpp`
(`_compute_index_ranges_weights`, `_compute_index_ranges_int16_weights`, `nearest_idx`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Filter = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Mode = Literal["pillow12", "pillow13", "torchvision"]
"""Whose numbers: Pillow up to 12, Pillow from 13, torchvision's uint8 resize on a CPU with antialias."""

FILTERS: tuple[Filter, ...] = get_args(Filter)
MODES: tuple[Mode, ...] = get_args(Mode)

PILLOW_BITS = 22
"""Fraction bits of Pillow's weights: 32, less 8 for the pixel, less 2 for sums that overshoot."""
COPY_BITS = 14
"""Fraction bits of a table that only copies; any number would do that leaves the weight under 2^23."""
LARGEST_WEIGHT = 127 * (1 + 256 + 256**2)
"""What three signed bytes hold, as the matrix product of `resize_first` takes a weight apart."""

_BICUBIC_A = -0.5


@dataclass(frozen=True, eq=False)
class Table:
    """One axis of a resize. Output i is `clip((Σ_t pixel[starts[i] + t] · weights[i, t] + 2^(bits−1)) >> bits)`."""

    starts: NDArray[np.int32]
    """[n_out], the first source pixel of each output, never falling."""
    weights: NDArray[np.int32]
    """[n_out, n_taps], zero where an output has fewer taps than the most; such taps may lie outside the source."""
    bits: int
    """Fraction bits of the weights."""

    @property
    def n_taps(self) -> int:
        """The largest number of source pixels that one output depends on."""
        return int(self.weights.shape[1])


def vertical_first(mode: Mode, source: tuple[int, int], target: tuple[int, int]) -> bool:
    """Say whether a resize from `source` to `target`, both (height, width), works along the columns first."""
    rows_lost, columns_lost = source[0] - target[0], source[1] - target[1]
    return mode == "pillow13" and rows_lost > 0 and rows_lost > 2 * columns_lost


@lru_cache(maxsize=1024)
def table(filter: Filter, mode: Mode, n_in: int, n_out: int) -> Table:
    """Return the table that takes one axis from `n_in` to `n_out` pixels; its arrays are read-only.

    Raises ValueError for an unknown filter or mode and for sizes below one.
    """
    if filter not in FILTERS or mode not in MODES:
        raise ValueError(
            f"the filter must be one of {', '.join(FILTERS)} and the mode one of {', '.join(MODES)}; "
            f"got {filter!r} and {mode!r}"
        )
    if n_in < 1 or n_out < 1:
        raise ValueError(f"an image axis has at least one pixel, got {n_in} to be resized to {n_out}")
    if n_in == n_out:
        made = _copying(np.arange(n_out))
    elif filter == "nearest":
        made = _copying(_nearest(mode, n_in, n_out))
    else:
        made = _weighted(filter, mode, n_in, n_out)
    assert np.abs(made.weights).max() <= LARGEST_WEIGHT
    assert np.abs(made.weights.astype(np.int64)).sum(1).max() * 255 + 2**made.bits < 2**31
    made.starts.flags.writeable = made.weights.flags.writeable = False
    return made


def _copying(sources: NDArray[np.int64]) -> Table:
    return Table(
        starts=sources.astype(np.int32),
        weights=np.full((len(sources), 1), 1 << COPY_BITS, np.int32),
        bits=COPY_BITS,
    )


def _nearest(mode: Mode, n_in: int, n_out: int) -> NDArray[np.int64]:
    if mode == "torchvision":
        scale = np.float32(n_in) / np.float32(n_out)
        exact: NDArray[np.float32] = np.floor(np.arange(n_out, dtype=np.float32) * scale)
        return np.minimum(exact.astype(np.int64), n_in - 1)
    steps = np.full(n_out, n_in / n_out)  # Pillow adds step after step, and so inherits its rounding
    steps[0] *= 0.5
    return np.cumsum(steps).astype(np.int64)


def _weighted(filter: Filter, mode: Mode, n_in: int, n_out: int) -> Table:
    scale = n_in / n_out
    filter_scale = max(scale, 1.0)
    function, radius = _FUNCTIONS[filter]
    support = radius * filter_scale
    center = (np.arange(n_out) + 0.5) * scale
    # `trunc` and not `floor`: C casts towards zero, which matters only where the clip follows anyway
    first = np.maximum(np.trunc(center - support + 0.5), 0)
    end = np.minimum(np.trunc(center + support + 0.5), n_in)
    taps = np.arange(int((end - first).max()))[:, None]
    inside = taps < end - first  # [n_taps, n_out]
    # the operations and their order are C's: another order rounds differently
    weights = function((taps + first - center + 0.5) * (1.0 / filter_scale)) * inside
    total = np.zeros(n_out)
    for tap in weights:  # one after the other; `sum` would add in pairs
        total += tap
    weights = np.divide(weights, total, out=weights, where=total != 0)
    bits = PILLOW_BITS if mode != "torchvision" else _int16_bits(float(weights.max()))
    fixed = np.trunc(np.copysign(0.5, weights) + weights * 2.0**bits).astype(np.int32)
    return Table(starts=first.astype(np.int32), weights=np.ascontiguousarray(fixed.T), bits=bits)


def _int16_bits(largest: float) -> int:
    """Return the most fraction bits with which the largest weight still fits into 15 bits, at most 22."""
    bits = 0
    while bits < PILLOW_BITS and int(0.5 + largest * 2.0 ** (bits + 1)) < 1 << 15:
        bits += 1
    return bits


def _bilinear(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.abs(x)
    return np.where(x < 1, 1 - x, 0.0)


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x, a = np.abs(x), _BICUBIC_A
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _lanczos(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where((x >= -3) & (x < 3), _sinc(x) * _sinc(x / 3), 0.0)


def _sinc(x: NDArray[np.float64]) -> NDArray[np.float64]:
    angle = x * np.pi
    # the sine of the C library, as Pillow has it; NumPy's own may differ in the last bit
    sine = np.fromiter(map(math.sin, angle.ravel()), np.float64, angle.size).reshape(angle.shape)
    return np.divide(sine, angle, out=np.ones_like(angle), where=angle != 0)


_FUNCTIONS: dict[Filter, tuple[Callable[[NDArray[np.float64]], NDArray[np.float64]], float]] = {
    "bilinear": (_bilinear, 1.0),
    "bicubic": (_bicubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}
