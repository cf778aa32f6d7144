"""Every picture of a run: each figure as PNG, SVG and PDF, and the report; as bytes, by the name of their file.

They are made from what is written down of the run alone, so that `mmextract report` makes the same ones again.
This module writes no file.
"""

from __future__ import annotations

import hashlib
import re
from urllib.parse import quote

from mmextract.probes.figures import FORMATS, draw_all, save
from mmextract.probes.report import render
from mmextract.probes.results import Results

REPORT = "report.html"
LONGEST_STEM = 100
"""Bytes: file systems take 255, and a suffix and a temporary name's parts come on top."""


def make_pictures(results: Results) -> dict[str, bytes]:
    """Return the contents of each file; the report comes last."""
    files: dict[str, bytes] = {}
    vector: dict[str, bytes] = {}
    for name, figure in draw_all(results).items():
        for kind in FORMATS:
            files[f"{file_stem(name)}.{kind}"] = save(figure, kind)
        vector[name] = files[f"{file_stem(name)}.svg"]
    return {**files, REPORT: render(results, vector).encode()}


def file_stem(name: str) -> str:
    """Return a name as part of a file's, the same on every system: what is not plain is percent-encoded.

    A name that would be too long, or that a system takes for another's, ends in a hash of all of it.
    """
    stem = quote(name, safe="")
    stem = re.sub(r"[~*]", lambda found: f"%{ord(found[0]):02X}", stem)
    if stem.startswith("."):
        stem = f"%2E{stem[1:]}"
    if len(stem) > LONGEST_STEM:
        stem = f"{stem[: LONGEST_STEM - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return stem
