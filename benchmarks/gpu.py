"""The kernels and the capture path on a GPU: exactness, limits, ratios: `python benchmarks/gpu.py --out DIR`.

Needs a checkout, torch, torchvision, Triton, transformers and Pillow. With what a store is written with (zarr,
numcodecs, google-crc32c, xxhash) the section `dump` measures whole dumps of image files, without it the part of them
on the device. Ends in under nine minutes on an H100. Prints one table and writes DIR/gpu.json with the card's name.
`--smoke` runs every section on the CPU, under Triton's interpreter and at tiny sizes, to see that the script works; its
timings mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from gpu_setup import Bench, Figure, make_importable, table

SECTIONS = ("exact", "ceilings", "images", "states", "dump")


def main() -> None:
    """Run the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU; timings mean nothing")
    arguments = parser.parse_args()
    make_importable()
    if arguments.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import torch

    if not arguments.smoke and not torch.cuda.is_available():
        raise SystemExit(
            "gpu.py measures a CUDA device, and torch finds none here. To see that the script itself works, run it "
            "with --smoke."
        )
    from harness import save

    bench = Bench(smoke=arguments.smoke, repeats=1 if arguments.smoke else arguments.repeats)
    for name in arguments.sections:
        started = time.perf_counter()
        bench.figures[name] = list(_section(name)(bench))
        print(f"{name}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
        # after each section, so that a run that is cut off leaves what it found
        save(arguments.out / "gpu.json", {"smoke": bench.smoke, "sections": bench.record()})
    print("CPU, timings mean nothing" if bench.smoke else torch.cuda.get_device_name())
    print(table(bench))
    if bench.figures.get("exact") and any(f.verdict == "missed" for f in bench.figures["exact"]):
        raise SystemExit("the kernels are not exact on this device, see above")


def _section(name: str) -> Callable[[Bench], Iterable[Figure]]:
    import gpu_exact
    import gpu_forward
    import gpu_speed

    return {
        "exact": gpu_exact.run,
        "ceilings": gpu_speed.ceilings,
        "images": gpu_speed.images,
        "states": gpu_speed.states,
        "dump": gpu_forward.run,
    }[name]


if __name__ == "__main__":
    main()
