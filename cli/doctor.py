"""`mmextract doctor`: what is installed, what devices there are, and which back ends would be used and why."""

from __future__ import annotations

import json
import platform
from importlib import metadata

import rich_click as click

PACKAGES = (
    *("mmextract", "torch", "torchvision", "triton", "transformers", "tokenizers", "peft", "accelerate"),
    *("zarr", "numcodecs", "numpy", "dask", "distributed", "scikit-learn", "pyarrow", "pillow"),
    *("datasets", "cuml-cu13", "dask-cuda"),
)


@click.command()
@click.option(
    "--json",
    "as_json",
    envvar="MMEXTRACT_DOCTOR_JSON",
    is_flag=True,
    help="Print everything as JSON on stdout.",
)
def doctor(as_json: bool) -> None:
    """Say which versions, devices and back ends there are."""
    record = {"python": platform.python_version(), "platform": platform.platform()}
    record |= {name: _version(name) for name in PACKAGES}
    record |= _devices() | _backends()
    if as_json:
        click.echo(json.dumps(record, indent=1))
        return
    for name, value in record.items():
        click.echo(f"{name:<18} {value}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    import os

    import torch

    devices = {"cpu": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return devices


def _backends() -> dict[str, str]:
    import torch

    gpu = torch.cuda.is_available()
    why = "a CUDA device answers" if gpu else "no CUDA device answers"
    return {
        "dump runs on": f"{'cuda' if gpu else 'cpu'} ({why})",
        "images": "Pillow decodes, the model's own processor does the rest",
        "watermarks": "composited on the CPU, exactly as Pillow does",
        "probes": f"dual and primal solvers on {'cuda' if gpu else 'cpu'}; scikit-learn as a reference",
    }
