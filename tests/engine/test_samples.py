"""Every format gives the same samples; what is wrong with a data set is said with its place, before a run."""

import csv
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmextract.engine import columnar
from mmextract.engine.images import RejectedSample, decode
from mmextract.engine.samples import FORMATS, Dataset, Sample, Turn, read_samples

COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
ROWS: list[dict[str, Any]] = [
    {"id": "007", "image": "red.png", "question": "Which colour?", "answer": "red", "shape": "circle"},
    {
        "id": "b",
        "image": "sub/green.png",
        "question": 'Is it, or not,\n"green"?',
        "answer": "yes",
        "shape": "box",
    },
    {"id": "c", "image": "blue.png", "question": "Farbe? 青い", "answer": "blau", "shape": "circle"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of three images, one of them in a folder of its own."""
    for color, row in zip(COLORS, ROWS, strict=True):
        path = tmp_path / row["image"]
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (5, 4), color).save(path)
    return tmp_path


def write_json(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps(rows), "utf-8")
    return path


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


def image_bytes(folder: Path, row: dict[str, Any]) -> bytes:
    return Path(folder, row["image"]).read_bytes()


def write_parquet_bytes(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write_parquet(path, [{**row, "image": image_bytes(path.parent, row)} for row in rows])


def write_parquet_structs(path: Path, rows: list[dict[str, Any]]) -> Path:
    structs = [{"bytes": image_bytes(path.parent, row), "path": row["image"]} for row in rows]
    return write_parquet(path, [{**row, "image": image} for row, image in zip(rows, structs, strict=True)])


def write_dataset(path: Path, rows: list[dict[str, Any]]) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = [{**row, "image": str(path.parent / row["image"])} for row in rows]
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    dataset.save_to_disk(path / "saved")
    return path / "saved"


def write_llava(path: Path, rows: list[dict[str, Any]]) -> Path:
    kept = ("id", "image", "shape")
    return write_json(path, [
        {name: row[name] for name in kept}
        | {"conversations": [
            {"from": "human", "value": f"<image>\n{row['question']}"},
            {"from": "gpt", "value": row["answer"]},
        ]}
        for row in rows
    ])  # fmt: skip


def write_qwen_tags(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write_json(path, [
        {"id": row["id"], "shape": row["shape"]}
        | {"conversations": [
            {"from": "user", "value": f"<img>{row['image']}</img>\n{row['question']}"},
            {"from": "assistant", "value": row["answer"]},
        ]}
        for row in rows
    ])  # fmt: skip


def write_qwen_messages(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write_jsonl(path, [
        {"id": row["id"], "shape": row["shape"]}
        | {"messages": [
            {"role": "user", "content": [
                {"type": "image", "image": row["image"]}, {"type": "text", "text": f"\n{row['question']}"},
            ]},
            {"role": "assistant", "content": row["answer"]},
        ]}
        for row in rows
    ])  # fmt: skip


WRITERS: dict[str, tuple[str, Callable[[Path, list[dict[str, Any]]], Path]]] = {
    "jsonl": ("jsonl", write_jsonl),
    "json": ("json", write_json),
    "csv": ("csv", write_csv),
    "tab-separated": ("csv", lambda path, rows: write_csv(path, rows, "\t")),
    "semicolons": ("csv", lambda path, rows: write_csv(path, rows, ";")),
    "parquet-paths": ("parquet", write_parquet),
    "parquet-structs": ("parquet", write_parquet_structs),
    "llava": ("llava", write_llava),
    "qwen-tags": ("qwen", write_qwen_tags),
    "qwen-messages": ("qwen", write_qwen_messages),
}


def colors(dataset: Dataset) -> list[tuple[int, ...]]:
    return [tuple(decode(s.image).pixels[0, 0].tolist()) for s in dataset.samples if s.image is not None]


@pytest.mark.parametrize(("format", "write"), WRITERS.values(), ids=WRITERS.keys())
def test_every_format_is_recognised_and_gives_the_same_samples(
    format: str, write: Callable[[Path, list[dict[str, Any]]], Path], folder: Path
) -> None:
    path = write(folder / "data", ROWS)
    found = read_samples(path)
    expected = read_samples(write_jsonl(folder / "expected.jsonl", ROWS))
    assert found.format == format
    for sample, row in zip(found.samples, ROWS, strict=True):
        assert (sample.id, sample.answer, sample.columns) == (
            row["id"],
            row["answer"],
            {"shape": row["shape"]},
        )
        assert sample.turns == (Turn(role="user", text=f"<image>\n{row['question']}"),)
        assert sample.image is not None and sample.image.name == row["image"]
    assert colors(found) == COLORS
    assert found.fingerprint == expected.fingerprint
    assert read_samples(path, format=format) == found


def test_images_given_as_bytes_are_named_by_their_row(folder: Path) -> None:
    found = read_samples(write_parquet_bytes(folder / "data", ROWS))
    assert [s.image.name for s in found.samples if s.image is not None] == ["row 0", "row 1", "row 2"]
    assert colors(found) == COLORS


def test_a_saved_dataset_is_read_with_its_images_inside_and_its_labels_by_name(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = write_dataset(folder / "data", ROWS)
    found = read_samples(path)
    assert (found.format, [s.id for s in found.samples]) == ("datasets", ["007", "b", "c"])
    assert found.samples[1].columns == {"shape": "box"}
    for row in ROWS:
        (folder / row["image"]).unlink()
    assert colors(pickle.loads(pickle.dumps(found))) == COLORS

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = {"text": ["a", "b", "c"], "label": [1, None, 0]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(folder / "labelled")
    labels = [sample.columns["label"] for sample in read_samples(folder / "labelled").samples]
    assert labels == ["dog", None, "cat"]


def test_a_dataset_saved_anew_is_read_anew(folder: Path) -> None:
    path = write_dataset(folder / "data", ROWS[:1])
    assert colors(read_samples(path)) == COLORS[:1]
    shutil.rmtree(path)
    write_dataset(folder / "data", ROWS[1:])
    os.utime(path / "state.json", ns=(0, 0))
    assert colors(read_samples(path)) == COLORS[1:]


def test_a_dataset_of_splits_asks_for_one(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(folder / "splits")
    for format in (None, "datasets"):
        with pytest.raises(
            ValueError, match=r"holds the splits test, train: name one of them, such as .*splits/test"
        ):
            read_samples(folder / "splits", format=format)


def test_a_saved_dataset_without_the_package_says_how_to_install_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_dataset(folder / "data", ROWS)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r'pip install "mmextract\[datasets\]"'):
        read_samples(path)


def test_a_folder_of_images_is_read_in_the_order_of_its_paths(folder: Path) -> None:
    for name in ("notes.txt", ".hidden.png", ".cache/hidden.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not listed")
    (folder / "a").mkdir()
    shutil.copy(folder / "red.png", folder / "a" / "z.png")
    found = read_samples(folder, prompt="Who?")
    assert found.format == "images"
    assert [sample.id for sample in found.samples] == ["a/z.png", "blue.png", "red.png", "sub/green.png"]
    assert [sample.columns["folder"] for sample in found.samples] == ["a", "", "", "sub"]
    assert {sample.turns for sample in found.samples} == {(Turn(role="user", text="<image>\nWho?"),)}
    assert colors(found) == [COLORS[0], COLORS[2], COLORS[0], COLORS[1]]


def test_a_folder_with_a_table_of_its_images_is_read_by_the_table(folder: Path) -> None:
    rows = [{"file_name": row["image"], "text": row["question"]} for row in ROWS]
    write_csv(folder / "metadata.csv", rows)
    found = read_samples(folder)
    assert (found.format, colors(found)) == ("csv", COLORS)
    assert read_samples(folder, format="images", prompt="Who?").format == "images"


def test_every_other_column_is_kept_with_its_type(folder: Path) -> None:
    values = {
        "n": 3,
        "x": 0.5,
        "ok": True,
        "none": None,
        "list": [1, {"é": 2}],
        "label": "cat",
        "question_id": 9,
    }
    found = read_samples(write_jsonl(folder / "d.jsonl", [{**ROWS[0], **values}]))
    expected = {**values, "list": '[1, {"é": 2}]', "shape": "circle"}
    assert found.samples[0].columns == expected


def test_parquet_columns_are_kept_as_text_where_no_plain_value_fits_and_binary_ones_are_left_out(
    folder: Path,
) -> None:
    table = pa.table({
        "question": ["q"],
        "when": pa.array([1_700_000_000_123_456_789], pa.timestamp("ns")),
        "nested": [{"a": [1, 2]}],
        "blob": [b"x"],
        "blobs": [[b"x"]],
        "small": pa.array([7], pa.int8()),
        "kind": pa.array(["k"]).dictionary_encode(),
    })  # fmt: skip
    pq.write_table(table, folder / "d.parquet")
    columns = read_samples(folder / "d.parquet").samples[0].columns
    when = "2023-11-14 22:13:20.123456789"
    assert columns == {"when": when, "nested": '{"a": [1, 2]}', "small": 7, "kind": "k"}


def test_an_unnamed_image_column_is_found_by_its_shape(folder: Path) -> None:
    image = {"bytes": image_bytes(folder, ROWS[0]), "path": None}
    path = write_parquet(folder / "d.parquet", [{"photo": image, "question": "q"}])
    assert colors(read_samples(path)) == COLORS[:1]
    two = write_parquet(folder / "e.parquet", [{"photo": image, "mask": image, "question": "q"}])
    with pytest.raises(ValueError, match="columns photo, mask all hold images: rename"):
        read_samples(two)


def test_lists_of_images_are_refused_rather_than_overlooked(folder: Path) -> None:
    path = write_parquet(folder / "d.parquet", [{"images": [image_bytes(folder, ROWS[0])], "question": "q"}])
    with pytest.raises(ValueError, match=r"column `images` holds list.*one image a row is supported"):
        read_samples(path)


def test_text_alone_can_stand_beside_images_in_every_kind_of_column(folder: Path) -> None:
    data = image_bytes(folder, ROWS[0])
    cases: list[tuple[str, Any, Any]] = [
        ("paths.parquet", "red.png", None),
        ("bytes.parquet", data, None),
        ("structs.parquet", {"bytes": data, "path": None}, None),
        ("files.parquet", {"bytes": None, "path": "red.png"}, {"bytes": None, "path": None}),
    ]
    for name, image, none in cases:
        rows = [
            {"question": "a", "image": image},
            {"question": "b", "image": none},
            {"question": "c", "image": image},
        ]
        samples = read_samples(write_parquet(folder / name, rows)).samples
        assert [sample.image is None for sample in samples] == [False, True, False], name
        assert [sample.turns[0].text for sample in samples] == ["<image>\na", "b", "<image>\nc"]
        assert colors(Dataset(samples=samples, format="", source="", fingerprint="")) == [COLORS[0]] * 2


def test_image_bytes_are_read_only_when_asked_for(folder: Path) -> None:
    path = write_parquet_structs(folder / "d.parquet", ROWS)
    column = pq.read_metadata(path).row_group(0).column(1)
    assert column.path_in_schema == "image.bytes"
    with path.open("r+b") as file:
        file.seek(column.dictionary_page_offset or column.data_page_offset)
        file.write(b"\xff" * column.total_compressed_size)
    samples = read_samples(path).samples
    assert [sample.id for sample in samples] == ["007", "b", "c"]
    assert len(pickle.dumps(samples)) < 3_000
    assert samples[0].image is not None
    with pytest.raises(ValueError, match=r"row group 0 of .*d\.parquet cannot be read"):
        decode(samples[0].image)


def test_a_row_group_too_large_to_be_read_at_once_says_how_to_write_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columnar, "MAX_ROW_GROUP_BYTES", 100)
    with pytest.raises(ValueError, match=r"row group 0 holds .* bytes of images.*row_group_size"):
        read_samples(write_parquet_bytes(folder / "d.parquet", ROWS))


def test_ids_default_to_row_numbers_and_may_come_from_any_column(folder: Path) -> None:
    rows = [{"row": "x", "name": f"n{i}", "question": "q"} for i in range(3)]
    path = write_jsonl(folder / "d.jsonl", rows)
    assert [s.id for s in read_samples(path).samples] == ["0", "1", "2"]
    assert [s.id for s in read_samples(path, id_column="name").samples] == ["n0", "n1", "n2"]
    assert read_samples(path).samples[0].columns == {"row": "x", "name": "n0"}


def test_repeated_ids_are_refused_with_a_way_out_that_works(folder: Path) -> None:
    path = write_llava(folder / "d.json", [ROWS[0], ROWS[1], {**ROWS[2], "id": "007"}])
    with pytest.raises(ValueError, match=r"row 2: id '007' was already used at .*row 0: .*--id-column row"):
        read_samples(path)
    samples = read_samples(path, id_column="row").samples
    assert [(s.id, s.columns["id"]) for s in samples] == [("0", "007"), ("1", "b"), ("2", "007")]


def test_a_prompt_is_asked_of_every_sample_and_the_questions_become_columns(folder: Path) -> None:
    path = write_jsonl(folder / "d.jsonl", [ROWS[0], {"id": "t", "question": "Text?"}])
    first, second = read_samples(path, prompt="Who?").samples
    assert first.turns[0].text == "<image>\nWho?" and second.turns[0].text == "Who?"
    assert (first.columns["question"], first.answer) == ("Which colour?", "red")


def test_the_image_root_is_the_folder_of_the_data_unless_given(folder: Path, tmp_path_factory: Any) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = write_jsonl(elsewhere / "d.jsonl", ROWS)
    assert colors(read_samples(path, image_root=folder)) == COLORS
    absolute = write_jsonl(elsewhere / "e.jsonl", [{"image": str(folder / "red.png"), "question": "q"}])
    assert colors(read_samples(absolute, image_root=folder)) == COLORS[:1]
    with pytest.raises(ValueError, match=r"e\.jsonl:1: image .*red\.png' lies outside of the image root"):
        read_samples(absolute)
    with pytest.raises(ValueError, match=r"none of the 3 image files exists .*--image-root"):
        read_samples(path)


def test_samples_do_not_depend_on_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(folder / "d.jsonl", ROWS)
    write_parquet_bytes(folder / "d.parquet", ROWS)
    monkeypatch.chdir(folder)
    found = [
        read_samples(Path("d.jsonl")),
        read_samples(Path("d.parquet")),
        read_samples(Path(), prompt="Who?"),
    ]
    monkeypatch.chdir("/")
    assert [len(colors(dataset)) for dataset in found] == [3, 3, 3]


def test_a_limit_takes_the_first_samples(folder: Path) -> None:
    for write in (write_jsonl, write_parquet_bytes, write_llava):
        assert [s.id for s in read_samples(write(folder / "d", ROWS), limit=2).samples] == ["007", "b"]


def test_the_fingerprint_changes_with_whatever_a_sample_says(folder: Path) -> None:
    def fingerprint(**changes: Any) -> str:
        return read_samples(write_jsonl(folder / "d.jsonl", [ROWS[0], {**ROWS[1], **changes}])).fingerprint

    changes: list[dict[str, Any]] = [
        {},
        {"id": "z"},
        {"question": "Why?"},
        {"answer": "no"},
        {"image": "blue.png"},
        {"shape": "x"},
        {"extra": None},
    ]
    assert len({fingerprint(**change) for change in changes}) == len(changes)
    assert fingerprint() == fingerprint() != read_samples(folder / "d.jsonl", prompt="Who?").fingerprint


def test_a_dataset_describes_itself_in_json(folder: Path) -> None:
    dataset = read_samples(write_jsonl(folder / "d.jsonl", [*ROWS, {"id": "t", "question": "q"}]))
    described = json.loads(json.dumps(dataset.describe()))
    assert described == {
        "source": str(folder / "d.jsonl"),
        "format": "jsonl",
        "fingerprint": dataset.fingerprint,
        "n_samples": 4,
        "n_images": 3,
    }


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "blank": (b" \n\n", "is empty"),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0", "no known format.*for images, give their folder"),
    "prose": (b"Dear reader,\nhello", "no known format: expected Parquet, JSON"),
    "no records": (b"[]", "holds no samples"),
    "header only": (b"id,question\n", "holds no samples"),
    "broken json": (b'[{"id": 1,\n "question": }]', r"data:2: invalid JSON, expected a JSON list.*column 14"),
    "broken jsonl": (b'{"question": "a"}\n\n{"question"\n', r"data:3: invalid JSON, expected one JSON"),
    "a json object": (b'{\n "data": []\n}', r"data:1: invalid JSON, expected one JSON object a line"),
    "numbers": (b"[1, 2]", "row 0: expected a JSON object with named columns, got int 1"),
    "lists": (b'{"question": "a"}\n["b"]\n', r"data:2: expected a JSON object .* got list"),
    "deep nesting": (b"[" * 200_000, "unusable JSON"),
    "long number": (b'[{"question": "q", "n": ' + b"9" * 5000 + b"}]", "unusable JSON"),
    "latin-1 jsonl": ('{"question": "a"}\n{"question": "é"}\n'.encode("latin-1"), r"data:2: not UTF-8"),
    "latin-1 json": ('[{"question":\n"é"}]'.encode("latin-1"), r"data:2: not UTF-8"),
    "latin-1 csv": ("question\na\né\n".encode("latin-1"), r"data:3: not UTF-8"),
    "utf-16": ("question\na\n".encode("utf-16"), "no known format"),
    "half a surrogate": (b'{"question": "\\ud800"}', r"data:1: half a surrogate pair \('\\ud800'\)"),
    "ragged csv": (b"id,question\n1,a\n2,b,c\n", r"data:3: expected 2 values \(id, question\), got 3"),
    "open quote": (b'id,question\n1,"a\n2,b\n', r"data:2: invalid CSV"),
    "twice named": (b"id,question,id\n1,a,b\n", "data:1: two columns are named id"),
    "no question": (b'{"image": "red.png", "height": 3}', r"data:1: no question.*record has image, height"),
    "no id": (b'{"id": 1, "question": "a"}\n{"question": "b"}', r"data:2: no id in column `id`"),
    "empty id": (b"id,question\n,a\n", "data:2: no id in column `id`"),
    "same id": (b"id,question\n1,a\n2,b\n1,c\n", r"data:4: id '1' was already used at .*data:2"),
    "escape": (b'{"image": "../x.png", "question": "a"}', r"data:1: image '\.\./x\.png' lies outside"),
    "number as image": (b'{"image": 5, "question": "a"}', "data:1: an image must be given by its path"),
    "missing images": (b'{"image": "x.png", "question": "a"}', "none of the 1 image files exists"),
    "slot, no image": (b'{"question": "<image>?"}', "data:1: the prompt has an image slot"),
    "damaged parquet": (b"PAR1" + b"\0" * 100, "not a readable Parquet file"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_what_is_wrong_with_a_file_is_said_with_its_place(data: bytes, message: str, folder: Path) -> None:
    (folder / "data").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_samples(folder / "data")


def test_long_prompts_bom_crlf_and_unnamed_columns_are_read(folder: Path) -> None:
    long = "x" * 1_000_000
    (folder / "d.csv").write_bytes(f"\ufeff,question\r\n0,{long}\r\n\r\n1,b\r\n".encode())
    samples = read_samples(folder / "d.csv").samples
    assert [(s.turns[0].text, s.columns) for s in samples] == [
        (long, {"column_0": "0"}),
        ("b", {"column_0": "1"}),
    ]
    (folder / "d.json").write_bytes(b'\xef\xbb\xbf [{"question": "a"}]')
    assert len(read_samples(folder / "d.json").samples) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "xml"}, f"unknown format 'xml': expected one of {', '.join(FORMATS)}"),
        ({"prompt": " "}, "prompt must be a text"),
        ({"prompt": "<image><image>"}, "at most one <image>"),
        ({"image_root": Path("/nowhere")}, "image root /nowhere is not a folder"),
        ({"limit": 0}, "at least 1 sample"),
        ({"id_column": "name"}, r"d\.jsonl:1: no id in column `name` \(the record has id, image"),
        ({"format": "images"}, "is not a folder, which the format images needs"),
        ({"format": "parquet"}, "not a readable Parquet file"),
        ({"format": "llava"}, r"d\.jsonl:1: the llava format needs a list of turns in `conversations`"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str, folder: Path) -> None:
    path = write_jsonl(folder / "d.jsonl", ROWS)
    with pytest.raises(ValueError, match=message):
        read_samples(path, **arguments)


def test_folders_that_do_not_fit_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no data at .*nothing"):
        read_samples(folder / "nothing")
    with pytest.raises(ValueError, match="which has no questions: give a prompt"):
        read_samples(folder)
    with pytest.raises(ValueError, match="is not a file, which the format csv needs"):
        read_samples(folder, format="csv")
    with pytest.raises(ValueError, match="not a data set saved by `datasets`"):
        read_samples(folder, format="datasets")
    (folder / "empty").mkdir()
    write_jsonl(folder / "empty" / "qa.jsonl", ROWS)
    with pytest.raises(
        ValueError, match=r"holds no image .*to read a table in it, name it, such as .*qa\.jsonl"
    ):
        read_samples(folder / "empty", prompt="Who?")
    with pytest.raises(ValueError, match="not JSON, which the format llava needs, but csv"):
        read_samples(write_csv(folder / "d.csv", ROWS), format="llava")


def test_a_linked_folder_and_a_name_that_is_not_utf8_are_refused_rather_than_overlooked(folder: Path) -> None:
    (folder / "link").symlink_to(folder / "sub")
    with pytest.raises(ValueError, match="link is a link to a folder"):
        read_samples(folder, prompt="Who?")
    (folder / "link").unlink()
    (folder / os.fsdecode(b"\xff.png")).write_bytes(b"x")
    with pytest.raises(ValueError, match="not UTF-8: rename the file"):
        read_samples(folder, prompt="Who?")


def test_accepted_and_rejected_images_together_are_all_images_of_the_folder(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    for number in range(140):
        (folder / f"cut{number:03}.png").write_bytes(whole[: number * len(whole) // 140])
    (folder / "page.HEIC").write_bytes(b"not decoded, yet an image to its owner")
    (folder / "outside.png").symlink_to("/etc/passwd")
    (folder / "dangling.png").symlink_to("nothing")
    os.mkfifo(folder / "fifo.png")
    found = {sample.id: pixels_or_reason(sample) for sample in read_samples(folder, prompt="Who?").samples}
    assert len(found) == 148
    accepted = {id for id, outcome in found.items() if not isinstance(outcome, str)}
    assert {"whole.png", "red.png", "blue.png", "sub/green.png"} <= accepted
    assert not {"page.HEIC", "outside.png", "dangling.png", "fifo.png", "cut000.png", "cut100.png"} & accepted
    for id in accepted - {"red.png", "blue.png", "sub/green.png"}:  # of some only the end mark was cut off
        np.testing.assert_array_equal(found[id], pixels)


def pixels_or_reason(sample: Sample) -> np.ndarray | str:
    assert sample.image is not None
    try:
        return decode(sample.image).pixels
    except RejectedSample as reason:
        return str(reason)
