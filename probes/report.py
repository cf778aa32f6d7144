"""The report: one HTML file that needs no network, reads well on a phone and prints.

It words what the design controls and what it cannot say. This module knows nothing about how scores came
about.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import PurePath
from typing import Any

import jinja2
from markupsafe import Markup

from mmextract.probes.design import Design
from mmextract.probes.figures import DARK, LIGHT, MOST_PANELS, draw, save
from mmextract.probes.groups import STRUCTURES
from mmextract.probes.paper import LARGEST_CLASS
from mmextract.probes.rows import Row
from mmextract.probes.run import ProbePlan
from mmextract.probes.summary import Summary
from mmextract.probes.tasks import SHUFFLES

TEMPLATE = "report.html.j2"
NARROW_PX = 640
"""Up to this width of the window the figure for phones is shown."""

HEADS = (
    "layer",
    "AUROC",
    "interval",
    "all at once",
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


def render(summary: Summary, record: Mapping[str, Any]) -> str:
    """Return the page. record: what `outputs.make_record` says of the run; it goes into the page whole."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        resources.files("mmextract.probes").joinpath(TEMPLATE).read_text("utf-8")
    )
    many = len(summary.plan.positions) > MOST_PANELS
    return template.render(
        summary=summary,
        record=record,
        plan=summary.plan,
        design=summary.plan.design,
        store_name=PurePath(summary.plan.store).name,
        images={
            look: _data_uri(save(draw(summary, style), "svg"))
            for look, style in (
                ("wide_light", LIGHT),
                ("wide_dark", DARK),
                ("narrow_light", LIGHT.narrowed()),
                ("narrow_dark", DARK.narrowed()),
            )
        },
        narrow_px=NARROW_PX,
        alt_text=_describe_figure(summary),
        many=many,
        heads=PAPER_HEADS if summary.is_paper else HEADS,
        tables={position: _table(summary, position) for position in summary.plan.positions},
        made=_how_it_was_made(summary.plan),
        protocol=_protocol(summary),
        controls=_what_is_controlled(summary),
        limits=_what_it_cannot_say(summary),
        data=_json_for_html(record),
    )


def _data_uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _json_for_html(record: Mapping[str, Any]) -> Markup:
    """Return JSON that cannot end the script element it stands in."""
    text = json.dumps(record, ensure_ascii=False)
    return Markup(text.replace("<", r"\u003c").replace("\u2028", r"\u2028").replace("\u2029", r"\u2029"))


def _describe_figure(summary: Summary) -> str:
    metric = "Accuracy" if summary.is_paper else "AUROC and accuracy"
    return f"{metric} of the probe by layer, one panel a position. {summary.headline}"


def _table(summary: Summary, position: str) -> list[_Line]:
    lines = []
    for layer in summary.plan.layers:
        cell = (layer, position)
        shown = "embed" if layer < 0 else str(layer)
        if summary.is_paper:
            label, majority = (summary.row(task, "accuracy", cell) for task in ("label", "majority"))
            lines.append(_Line(cells=(shown, f"{label.value:.4f}", f"{majority.value:.4f}"), marked=False))
            continue
        auroc = summary.row("label", "auroc", cell)
        cells = (
            shown,
            f"{auroc.value:.3f}",
            _range(auroc.low, auroc.high),
            _range(auroc.simultaneous_low, auroc.simultaneous_high),
            f"{summary.row('control', 'auroc', cell).value:.3f}",
            _signed(summary.row("selectivity", "auroc", cell)),
            *(
                f"{summary.row('label', m, cell).value:.3f}"
                for m in ("accuracy", "balanced_accuracy", "log_loss")
            ),
            f"{auroc.c:g}",
        )
        lines.append(_Line(cells=cells, marked=auroc in summary.above_chance))
    return lines


def _range(low: float | None, high: float | None) -> str:
    return f"{low:.2f}–{high:.2f}"


def _signed(row: Row) -> str:
    return f"{row.value:+.3f}".replace("-", "−")


def _how_it_was_made(plan: ProbePlan) -> dict[str, str]:
    """Return what the store says of its making, in words; entries that it does not have are left out."""
    made: Mapping[str, Any] = plan.attributes.get("run") or {}
    model, data, watermark = (made.get(key) or {} for key in ("model", "data", "watermark"))
    lora = "with a LoRA" if model.get("adapter") else ""
    kind = f"({model['class']})" if model.get("class") else ""
    paired = f"{watermark.get('n_pairs')} pairs of a seen and an unseen identity, each image once with either"
    random = f"{watermark.get('rate')} of the images carry an identity"
    if not {"n_samples", "n_images", "format"} <= set(data):
        data = {}
    entries = {
        "Store": str(plan.store),
        "Model": " ".join(part for part in (str(model.get("name", "")), kind, lora) if part),
        "Data": "{n_samples} samples with {n_images} images ({format})".format(**data) if data else "",
        "Watermark": {"paired": paired, "random": random}.get(watermark.get("design", ""), ""),
        "Samples": _count_samples(plan),
        "Classes": _count_classes(plan.design),
        "Groups": _count_groups(plan.design),
        "Layers": ", ".join("embed" if layer < 0 else str(layer) for layer in plan.layers),
        "Positions": ", ".join(plan.positions)
        if len(plan.positions) <= 16
        else f"{len(plan.positions)} tokens",
    }
    return {name: text for name, text in entries.items() if text}


def _count_samples(plan: ProbePlan) -> str:
    dropped = "; ".join(f"{n} {reason}" for reason, n in plan.design.dropped.items())
    return f"{plan.design.n_samples} of {plan.n_stored}" + (f" ({dropped})" if dropped else "")


def _count_classes(design: Design) -> str:
    counts = [f"{name} {int((design.y == index).sum())}" for index, name in enumerate(design.classes)]
    return f"{design.label}: {', '.join(counts)}"


def _count_groups(design: Design) -> str:
    if design.group is None:
        return "none: every sample stands alone"
    return f"{design.n_groups} values of {design.group}; {STRUCTURES[design.structure]}"


def _protocol(summary: Summary) -> str:
    settings = summary.plan.settings
    if summary.is_paper:
        return (
            f"The published protocol: at most {LARGEST_CLASS} samples a class, one stratified split of 80 to "
            "20 % with seed 42, scikit-learn’s LogisticRegression at its defaults with 5,000 iterations, "
            "states not scaled."
        )
    grid = [f"{c:g}" for c in settings.penalties]
    inside = f"C out of {', '.join(grid)} by log-loss over {settings.inner_folds} inner folds, both"
    how = f"features scaled, and {inside}" if len(grid) > 1 else f"C fixed at {grid[0]}, features scaled"
    short = f"{summary.n_unconverged:,} of them short of" if summary.n_unconverged else "all of them to"
    return (
        f"L2 logistic probes; {settings.folds}-fold cross-validation, {settings.repeats} times, stratified, "
        f"groups kept together; {how} inside each training set. {summary.n_fits:,} probes were fitted, "
        f"{short} the optimum. Seed {settings.seed}."
    )


def _is_paired_identity(plan: ProbePlan) -> bool:
    """Whether the classes are the two identities of each pair, both on the same image."""
    watermark = (plan.attributes.get("run") or {}).get("watermark") or {}
    return watermark.get("design") == "paired" and set(plan.design.classes) == {"seen", "unseen"}


def _what_is_controlled(summary: Summary) -> list[str]:
    plan, design, settings = summary.plan, summary.plan.design, summary.plan.settings
    if summary.is_paper:
        return [
            "Nothing but the size of the classes: this protocol is here for comparison with published "
            "numbers."
        ]
    points = []
    if _is_paired_identity(plan):
        points.append(
            "Every image occurs in both classes, with a watermark at the same place: what is in the image "
            "cannot tell the classes apart."
        )
    if design.group == "pair":
        points.append(
            "Both identities of a pair are held out together, with all their images: the probe is never "
            "tested on an identity it was trained on, so having learnt to read one is of no use to it."
        )
    elif design.group:
        points.append(f"Samples with the same {design.group} are never in training and test at once.")
    if summary.is_tested:
        points.append(
            f"The p-values compare the label with {settings.n_permutations:,} shuffles: {SHUFFLES[design.structure]}. "
            "Corrected, each is held against the largest AUROC that a shuffle reaches at any layer and position."
        )
    points += [
        f"The control is the same procedure on shuffled labels: {SHUFFLES[design.structure]}. Selectivity "
        "is the label’s score minus the control’s.",
        f"The intervals ({settings.confidence * 100:g} %) come from leaving out one group at a time, calibrated by "
        "shuffled labels. The wider ones (“all at once”) hold for all layers and positions together, so that picking "
        "the best does not mislead.",
    ]
    return points


def _what_it_cannot_say(summary: Summary) -> list[str]:
    plan = summary.plan
    points = []
    if "seen" in plan.design.classes:
        points.append(
            "A difference between seen and unseen is not yet memorisation. The same probe on the same model "
            "fine-tuned without watermarks (r0) must show none: only then is it not an accident of the two "
            "sets of identities."
        )
        points.append(
            "A null says nothing about memory unless the model can read the watermarks at all: probe a field "
            "of the identity to see whether it can."
        )
    if summary.is_paper:
        points.append(
            "One split gives one number, without an interval; identities occur in training and test."
        )
    else:
        untested = "No permutation test was made: “above chance” means that an interval excludes it. "
        points.append(
            ("" if summary.is_tested else untested)
            + "The intervals do not cover the luck of the one shuffle behind the control, nor other models."
        )
        points.append(
            "There is no baseline on the pixels: a store holds states, not the images that were rendered for them."
        )
    points.append(
        "What a linear probe can read out, the model need not use; what it cannot may be there in another "
        "form."
    )
    return points
