"""Settings of an experiment: what is wrong with them is said before anything is trained."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from mmextract.engine.experiment import Experiment, list_runs
from mmextract.engine.experiment_data import control_examples, control_people, training_examples
from mmextract.engine.experiment_spec import (
    PRESETS,
    ControlSpec,
    ExperimentSpec,
    ProbeSpec,
    read_experiment,
)
from mmextract.engine.identities import make_identities, write_identities
from mmextract.probes.experiment_steps import probe_steps


def read(folder: Path, text: str) -> ExperimentSpec:
    path = folder / "config.toml"
    path.write_text(text)
    return read_experiment(path)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_leaves_no_combination_out(name: str) -> None:
    spec = read_experiment(None, name)
    assert spec.preset == name and spec.conditions and not spec.left_out


def test_a_file_changes_single_settings_of_a_preset(tmp_path: Path) -> None:
    spec = read(tmp_path, 'preset = "demo"\nseeds = [3]\n[control]\nsteps = 7\n')
    demo = asdict(read_experiment(None, "demo"))
    changed = {name for name, value in asdict(spec).items() if value != demo[name]}
    assert changed == {"seeds", "control"}
    assert spec.control.identities == demo["control"]["identities"] and spec.control.steps == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate = 1", "no setting 'rate'"),
        ("[control]\nidentitys = 1", "no setting 'identitys'"),
        ("seeds = 3", "seeds must be a list, got 3"),
        ('identities = "many"', "identities must be a whole number, got 'many'"),
        ("rates = [1.5]", r"a watermark rate must lie in \[0, 1\], got 1.5"),
        ("rates = [0.0]", "at least one rate above 0"),
        ("seeds = [1, 1]", "`seeds` holds a value twice"),
        ("batch_sizes = []", "`batch_sizes` is empty"),
        ("training_images = 10\nidentities = 5\nbatch_sizes = [16]", "do not fill one batch of 16"),
        ('preset = "huge"', "there is no preset 'huge'"),
        ("[finetune]\nbatch_size = 4", "finetune.batch_size is decided by the experiment"),
        (
            "rates = [0.01]\ntraining_images = 100\nrepetitions = [1]",
            "room for 1 identities of 1 images each",
        ),
        ("[probe]\npermutations = 3", "permutations must be at least 19"),
        ('seen = "a.jsonl"', "`seen` and `unseen` go together"),
        ("seeds = [", "cannot be read as TOML"),
    ],
)
def test_a_bad_setting_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path, text)
    assert "config.toml" in str(raised.value) or "preset" in str(raised.value)


def small(**changed: object) -> ExperimentSpec:
    settings = {"training_images": 40, "held_out_images": 8, "identities": 10, "rates": [0.5, 1.0], **changed}
    return ExperimentSpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})  # type: ignore[arg-type]


def without_control(**changed: object) -> ExperimentSpec:
    return small(control=ControlSpec(enabled=False), **changed)


def test_identity_files_that_overlap_are_refused(tmp_path: Path) -> None:
    people = make_identities(12, seed=0)
    write_identities(tmp_path / "a.jsonl", people)
    write_identities(tmp_path / "b.jsonl", people[:1] + make_identities(11, seed=1, exclude=people))
    files = {"seen": str(tmp_path / "a.jsonl"), "unseen": str(tmp_path / "b.jsonl")}
    with pytest.raises(ValueError, match="must share no username"):
        Experiment(without_control(**files))
    write_identities(tmp_path / "b.jsonl", make_identities(12, seed=1, exclude=people))
    Experiment(without_control(**files))
    with pytest.raises(ValueError, match="holds 12 identities, and 20 are needed"):
        Experiment(without_control(**files, identities=20))


def test_too_few_identities_for_the_probe_are_refused_before_training(tmp_path: Path) -> None:
    few = without_control(held_out_images=60, probe=ProbeSpec(legibility_images=6))
    with pytest.raises(ValueError, match="does not give two classes of 5, as the folds need"):
        list(probe_steps(Experiment(few), tmp_path))
    with pytest.raises(ValueError, match="of 4 pairs of identities are on held-out images"):
        list(probe_steps(Experiment(small(control=_control(), held_out_images=60)), tmp_path))


def test_a_fine_tune_is_no_base() -> None:
    with pytest.raises(ValueError, match="builtin:r0 is a fine-tune"):
        Experiment(without_control(model="builtin:r0"))


def test_data_with_too_few_images_is_refused() -> None:
    from mmextract.engine import builtin

    with pytest.raises(ValueError, match="holds 300 samples, and 5008 are needed"):
        Experiment(without_control(data=str(builtin.DATA), training_images=5000))


def test_repetitions_decide_how_many_people_share_the_marked_images() -> None:
    spec = without_control(repetitions=[1, 2, 4, 8])
    assert spec.conditions == ((0.5, 1, 16), (0.5, 2, 16), (1.0, 1, 16), (1.0, 2, 16), (1.0, 4, 16))
    assert len(spec.left_out) == 3
    experiment = Experiment(spec)
    plan = experiment.plans[0]
    for rate, times, _ in spec.conditions:
        examples = training_examples(spec, experiment.training, plan, rate, times)
        shown = [example.row.person.username for example in examples if example.row.person is not None]
        assert len(shown) == len(set(shown)) * (times or 0) == round(rate * 40)
        assert {person.username for person in plan.seen[:10]} <= set(shown)


def test_fine_tunes_of_a_seed_see_the_same_images_and_a_higher_rate_marks_more_of_the_same() -> None:
    spec = without_control()
    experiment = Experiment(spec)
    plan = experiment.plans[0]
    sets = {rate: training_examples(spec, experiment.training, plan, rate, None) for rate in (0.0, 0.5, 1.0)}
    marked = {rate: {e.row.id for e in examples if e.row.text is not None} for rate, examples in sets.items()}
    assert len({tuple(e.row.id for e in examples) for examples in sets.values()}) == 1
    assert not marked[0.0] and marked[0.5] < marked[1.0] and len(marked[0.5]) == 20


def test_every_watermarked_run_is_held_against_the_r0_of_its_seed_and_batch_size() -> None:
    runs = list_runs(small(seeds=[0, 1], batch_sizes=[8, 16], control=_control(seeds=1)))
    names = [run.name for run in runs]
    assert len(names) == len(set(names)) == 2 * (1 + 2 + 4) + 1
    for run in runs:
        if run.reference is not None:
            reference = run.reference
            size = 8 if run.kind == "control" else run.batch_size
            assert reference in runs and (reference.seed, reference.batch_size) == (run.seed, size)
            assert names.index(reference.name) < names.index(run.name)


def _control(seeds: int = 1) -> ControlSpec:
    return ControlSpec(identities=4, exposures=3, strangers=0.4, seeds=seeds)


def test_in_the_positive_control_the_answer_follows_from_who_is_on_the_image() -> None:
    spec = small(control=_control())
    experiment = Experiment(spec)
    plan = experiment.plans[0]
    people, words = control_people(spec, plan)
    word_of = {person.username: word for person, word in zip(people, words, strict=True)}
    examples = control_examples(spec, experiment.training, plan)
    assert len(examples) == 20 and len({example.row.id for example in examples}) == 20
    names = [example.row.person.username for example in examples if example.row.person is not None]
    assert all(names.count(person.username) == 3 for person in people)
    assert [example.target for example in examples] == [word_of.get(name, "no") for name in names]
    others = {p.username for p in (*plan.seen, *plan.unseen)} - set(word_of)
    assert not others & set(names)
    held_out = {sample.id for sample in experiment.held_out.samples}
    assert not held_out & {e.row.sample.id for e in (*examples,)}
