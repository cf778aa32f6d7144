"""Every kernel, compiled ahead of time for GPUs that need not be there: what the compiler made of it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mmextract.kernels import layout, pool, resize_first, resize_second
from mmextract.kernels.triton_support import INTERPRETED

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    INTERPRETED, reason="Triton interprets kernels here, and so cannot compile them"
)

CAPABILITIES = (80, 90, 100)
SHARED_LIMIT = 48 * 1024
"""Bytes of shared memory that every GPU gives a program without being asked."""
POINTERS = {
    **dict.fromkeys(["packed_ptr", "masks_ptr", "middle_ptr"], "*u8"),
    **dict.fromkeys(["tables_ptr", "tiles_ptr", "tokens_ptr", "bounds_ptr", "counts_ptr"], "*i32"),
    **dict.fromkeys(["lut_ptr", "fill_ptr", "out_ptr", "states_ptr"], "*bf16"),
    "images_ptr": "*i64",
}


@dataclass(frozen=True, eq=False)
class Variant:
    """One kernel with one set of compile-time numbers, as its wrapper launches it."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    n_warps: int = 4
    vectors: bool = False
    """Whether alignment allows loads of several values at once."""
    tensor_cores: bool = False
    integers: tuple[str, ...] = field(default=())
    """Arguments that are numbers, all of which may be multiples of 16."""


def rows(step: int) -> Variant:
    n_rows, n_columns = layout.ROW_TILE
    constants = {"ROWS": n_rows, "COLUMNS": n_columns, "STEP": step}
    kernel = resize_first._resize_first_rows_kernel
    return Variant(f"rows {step}", kernel, constants, resize_first.warps_for(step), tensor_cores=True)


def columns(aligned: bool) -> Variant:
    n_rows, n_bytes = layout.COLUMN_TILE
    constants = {"ROWS": n_rows, "BYTES": n_bytes, "ALIGNED": aligned}
    kernel = resize_first._resize_first_columns_kernel
    return Variant(f"columns {'aligned' if aligned else 'anywhere'}", kernel, constants, vectors=aligned)


def second(axis: int, taps: int, patch: int) -> Variant:
    cut = {"PATCH": patch, "MERGE": 2 if patch else 1, "FRAMES": 2 if patch else 1}
    constants = {"AXIS": axis, "TAPS": taps, **cut, "BLOCK": layout.SECOND_TILE}
    name = f"second axis {axis} taps {taps} {'patches' if patch else 'chw'}"
    return Variant(name, resize_second._resize_second_kernel, constants)


POOL = Variant(
    "pool",
    pool._pool_kernel,
    {"BLOCK": pool.BLOCK},
    vectors=True,
    integers=("n_hidden", "states_by_sample", "states_by_token", "out_by_position", "out_by_sample"),
)
VARIANTS = (
    *(rows(step) for step in (32, 64)),
    *(columns(aligned) for aligned in (True, False)),
    second(0, 5, 14),
    second(0, 40, 0),
    second(1, 20, 14),
    POOL,
)


@cache
def compiled(variant: Variant, capability: int) -> Any:
    names = variant.kernel.arg_names
    numbers = {"n_samples": "i32", **dict.fromkeys(variant.integers, "i32")}
    signature = {name: POINTERS.get(name, numbers.get(name, "constexpr")) for name in names}
    aligned = [i for i, name in enumerate(names) if name in POINTERS or name in variant.integers]
    source = triton.compiler.ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs=variant.constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": variant.n_warps})


def stack_bytes(cubin: bytes, folder: Path) -> int:
    """Return how much memory a thread's stack takes, which is where registers spill to."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing)
    assert found, listing
    return int(found[1]) + int(found[2])


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda capability: f"sm_{capability}")
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_kernel_compiles_within_registers_and_shared_memory(
    variant: Variant, capability: int, tmp_path: Path
) -> None:
    made = compiled(variant, capability)
    assert stack_bytes(made.asm["cubin"], tmp_path) == 0, "registers spill"
    assert made.metadata.shared <= SHARED_LIMIT
    ptx = made.asm["ptx"]
    assert bool(re.search(r"ld\.global[.\w:]*\.v[24]\.b32", ptx)) == variant.vectors
    assert bool(re.search(r"mma\.sync\S*\.s32\.s8\.s8\.s32", ptx)) == variant.tensor_cores
    assert "wgmma" not in ptx and "tcgen05" not in ptx
