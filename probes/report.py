"""The report: one HTML file that needs no network, reads well on a phone and prints.

On the screen its charts are plotly's, which stands in the page compressed: its 4.8 MB become 2.0, so that a
report can be mailed; on paper, and without scripts, the figures stand in their place. It words what the design
controls and what it cannot say. This module knows nothing about how scores came about.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import PurePath
from typing import Any

import jinja2
from markupsafe import Markup

from mmextract.probes.charts import make_charts
from mmextract.probes.groups import STRUCTURES
from mmextract.probes.paper import LARGEST_CLASS
from mmextract.probes.results import MOST_POSITIONS, Results, Row
from mmextract.probes.separability import METRICS as SEPARABILITY
from mmextract.probes.tasks import SHUFFLES

TEMPLATE, SCRIPT, STYLE = "report.html.j2", "report.js", "report.css"
NARROW_PX = 640
"""Up to this width of the window the page is laid out for phones; the script has the same."""
MOST_TABLES = MOST_POSITIONS
LISTED_POSITIONS = 16

HEADS = (
    "layer",
    "AUROC",
    "interval",
    "all at once",
    "p",
    "control",
    "selectivity",
    "accuracy",
    "balanced",
    "log-loss",
    "C",
)
PAPER_HEADS = ("layer", "accuracy", "majority class")


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A layer in a table."""

    cells: tuple[str, ...]
    """As printed."""
    marked: bool
    """Above chance, with all layers and positions taken together."""


def render(results: Results, figures: Mapping[str, bytes]) -> str:
    """Return the page. figures: those for paper, by the stem of their file names, as SVG."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(read_resource(TEMPLATE))
    record = results.record
    return template.render(
        results=results,
        record=record,
        store_name=PurePath(record["store"]["path"]).name,
        images={name: data_uri(svg) for name, svg in figures.items()},
        style=Markup(style()),
        alt_text=f"{results.metric.upper()} of the probe by layer. {results.statement}",
        many=len(results.positions) > MOST_POSITIONS,
        heads=_heads(results),
        tables={position: _table(results, position) for position in results.shown_positions},
        separability={m: SEPARABILITY.get(m, m) for m in results.separability_metrics},
        projection_figures=[f"{method}-{position}" for method, position in results.figure_maps],
        made=_how_it_was_made(results),
        protocol=_protocol(results),
        controls=_what_is_controlled(results),
        limits=_what_it_cannot_say(results),
        charts=json_for_html(make_charts(results)),
        data=json_for_html({name: value for name, value in record.items() if name not in _LARGE}),
        plotly=Markup(plotly_text()),
        script=Markup(read_resource(SCRIPT)),
    )


_LARGE = ("rows", "columns", "separability")
"""Parts of the record that stand beside the page, not in it."""


def read_resource(name: str) -> str:
    """Return a file of this package."""
    return resources.files("mmextract.probes").joinpath(name).read_text("utf-8")


def style() -> str:
    """Return the style sheet of the reports."""
    return read_resource(STYLE).replace("NARROW_PX", f"{NARROW_PX}px")


@cache
def plotly_text() -> str:
    """Return plotly.js, compressed, in base64."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def data_uri(svg: bytes) -> str:
    """Return an image as an address that holds it."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def json_for_html(record: Mapping[str, Any]) -> Markup:
    """Return JSON that cannot end the script element it stands in."""
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", r"\u003c").replace("\u2028", r"\u2028").replace("\u2029", r"\u2029"))


def _heads(results: Results) -> tuple[str, ...]:
    if results.is_paper:
        return PAPER_HEADS
    return HEADS if results.n_permutations else tuple(head for head in HEADS if head != "p")


def _table(results: Results, position: str) -> list[_Line]:
    make = _paper_line if results.is_paper else _line
    return [make(results, (layer, position)) for layer in results.layers]


def _paper_line(results: Results, cell: tuple[int, str]) -> _Line:
    label, majority = (_number(results.row(task, "accuracy", cell), 4) for task in ("label", "majority"))
    return _Line(cells=(_name(cell[0]), label, majority), marked=False)


def _line(results: Results, cell: tuple[int, str]) -> _Line:
    auroc = results.row("label", "auroc", cell)
    selectivity = results.row("selectivity", "auroc", cell)
    cells = (
        _name(cell[0]),
        _number(auroc, 3),
        _range(auroc, ""),
        _range(auroc, "simultaneous_"),
        *([_p(auroc)] if results.n_permutations else []),
        _number(results.row("control", "auroc", cell), 3),
        f"{selectivity['value']:+.3f}".replace("-", "−") if selectivity else "",
        *(_number(results.row("label", m, cell), 3) for m in ("accuracy", "balanced_accuracy", "log_loss")),
        f"{auroc['c']:g}" if auroc and auroc["c"] is not None else "",
    )
    return _Line(cells=cells, marked=auroc is not None and results.is_found(auroc))


def _name(layer: int) -> str:
    return "embed" if layer < 0 else str(layer)


def _number(row: Row | None, digits: int) -> str:
    return "" if row is None or row["value"] is None else f"{row['value']:.{digits}f}"


def _range(row: Row | None, part: str) -> str:
    low, high = (row.get(f"{part}{end}") if row else None for end in ("low", "high"))
    return "" if low is None or high is None else f"{low:.2f}–{high:.2f}"


def _p(row: Row | None) -> str:
    p = row.get("p_corrected") if row else None
    return "" if p is None else f"{p:.3f}"


def _how_it_was_made(results: Results) -> dict[str, str]:
    """Return what the record says of the store's making, in words; entries that it does not have are left out."""
    record = results.record
    made: Mapping[str, Any] = record["store"]["attributes"].get("run") or {}
    model, data, watermark = (made.get(key) or {} for key in ("model", "data", "watermark"))
    lora = "with a LoRA" if model.get("adapter") else ""
    kind = f"({model['class']})" if model.get("class") else ""
    paired = f"{watermark.get('n_pairs')} pairs of a seen and an unseen identity, each image once with either"
    random = f"{watermark.get('rate')} of the images carry an identity"
    if not {"n_samples", "n_images", "format"} <= set(data):
        data = {}
    positions = results.positions
    entries = {
        "Store": str(record["store"]["path"]),
        "Compared with": results.compared_with or "",
        "Model": " ".join(part for part in (str(model.get("name", "")), kind, lora) if part),
        "Data": "{n_samples} samples with {n_images} images ({format})".format(**data) if data else "",
        "Watermark": {"paired": paired, "random": random}.get(watermark.get("design", ""), ""),
        "Samples": _count_samples(record),
        "Classes": _count_classes(record["design"]),
        "Groups": _count_groups(record["design"]),
        "Layers": ", ".join(map(_name, results.layers)),
        "Positions": ", ".join(positions)
        if len(positions) <= LISTED_POSITIONS
        else f"{len(positions)} tokens",
    }
    return {name: text for name, text in entries.items() if text}


def _count_samples(record: Mapping[str, Any]) -> str:
    design = record["design"]
    dropped = "; ".join(f"{n} {reason}" for reason, n in design["dropped"].items())
    total = record["store"]["n_samples"]
    return f"{design['n_samples']} of {total}" + (f" ({dropped})" if dropped else "")


def _count_classes(design: Mapping[str, Any]) -> str:
    counts = [f"{name} {n}" for name, n in design["classes"].items()]
    return f"{design['label']}: {', '.join(counts)}"


def _count_groups(design: Mapping[str, Any]) -> str:
    if design["group"] is None:
        return "none: every sample stands alone"
    return f"{design['n_groups']} values of {design['group']}; {STRUCTURES[design['structure']]}"


def _protocol(results: Results) -> str:
    settings, fits = results.record["settings"], results.record["fits"]
    if results.is_paper:
        return (
            f"The published protocol: at most {LARGEST_CLASS} samples a class, one stratified split of 80 to "
            "20 % with seed 42, scikit-learn’s LogisticRegression at its defaults with 5,000 iterations, "
            "states not scaled."
        )
    grid = [f"{c:g}" for c in settings["penalties"]]
    inside = f"C out of {', '.join(grid)} by log-loss over {settings['inner_folds']} inner folds, both"
    how = f"features scaled, and {inside}" if len(grid) > 1 else f"C fixed at {grid[0]}, features scaled"
    short = f"{fits['n_unconverged']:,} of them short of" if fits["n_unconverged"] else "all of them to"
    return (
        f"L2 logistic probes; {settings['folds']}-fold cross-validation, {_times(settings['repeats'])}, "
        f"stratified, groups kept together; {how} inside each training set. {fits['n']:,} probes were fitted, "
        f"{short} the optimum. Seed {settings['seed']}."
    )


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"


def _is_paired_identity(results: Results) -> bool:
    """Whether the classes are the two identities of each pair, both on the same image."""
    watermark = (results.record["store"]["attributes"].get("run") or {}).get("watermark") or {}
    return watermark.get("design") == "paired" and set(results.classes) == {"seen", "unseen"}


def _what_is_controlled(results: Results) -> list[str]:
    design, settings = results.record["design"], results.record["settings"]
    if results.is_paper:
        return [
            "Nothing but the size of the classes: this protocol is here for comparison with published "
            "numbers."
        ]
    points = []
    if _is_paired_identity(results):
        points.append(
            "Every image occurs in both classes, with a watermark at the same place: what is in the image "
            "cannot tell the classes apart."
        )
    if design["group"] == "pair":
        points.append(
            "Both identities of a pair are held out together, with all their images: the probe is never "
            "tested on an identity it was trained on, so having learnt to read one is of no use to it."
        )
    elif design["group"]:
        points.append(f"Samples with the same {design['group']} are never in training and test at once.")
    if results.n_permutations:
        points.append(
            f"The p-values compare the label with {results.n_permutations:,} shuffles: "
            f"{SHUFFLES[design['structure']]}. Corrected, each is held against the largest AUROC that a shuffle "
            "reaches at any layer and position."
        )
    how = (
        f"{settings['resamples']:,} resamplings of the groups, stretched for the overlap of the training sets"
        if "resamples" in settings
        else "leaving out one group at a time, calibrated by shuffled labels"
    )
    return [
        *points,
        f"The control is the same procedure on shuffled labels: {SHUFFLES[design['structure']]}. Selectivity "
        "is the label’s score minus the control’s.",
        f"The intervals ({results.percent}) come from {how}. The wider ones (“all at once”) hold for all layers and "
        "positions together, so that picking the best does not mislead.",
    ]


def _what_it_cannot_say(results: Results) -> list[str]:
    points = []
    if "seen" in results.classes:
        points.append(_say_what_memorisation_takes(results))
        points.append(
            "A null says nothing about memory unless the model can read the watermarks at all: probe a field "
            "of the identity to see whether it can."
        )
    if results.is_paper:
        points.append(
            "One split gives one number, without an interval; identities occur in training and test."
        )
    else:
        untested = "No permutation test was made: “above chance” means that an interval excludes it. "
        points.append(
            ("" if results.n_permutations else untested)
            + "The intervals do not cover the luck of the one shuffle behind the control, nor other models."
        )
        if "pixels" not in results.tasks:
            points.append(
                "There is no baseline on the pixels: a store holds states, not the images that were rendered for "
                "them."
            )
    points.append(
        "What a linear probe can read out, the model need not use; what it cannot may be there in another "
        "form."
    )
    if results.maps:
        points.append(
            "A projection shows two of many dimensions, and t-SNE and UMAP show islands in noise as well: pictures "
            "suggest, the probes decide."
        )
    return points


def _say_what_memorisation_takes(results: Results) -> str:
    if results.compared_with:
        return (
            f"The difference to {results.compared_with} is a memorisation score only if that model was fine-tuned "
            "in the same way, without watermarks (r0)."
        )
    return (
        "A difference between seen and unseen is not yet memorisation. The same probe on the same model "
        "fine-tuned without watermarks (r0) must show none: only then is it not an accident of the two "
        "sets of identities."
    )
