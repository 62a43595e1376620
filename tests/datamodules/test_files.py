"""Files of every kind are read as a stream, and what is no data is named."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from datamodules.files import data_files, read_records
from tests.datamodules.conftest import turns, write_jsonl

ROWS = [{"messages": turns(f"Question {i}?", f"Ä {i}.")} for i in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def read(path) -> list:
    field = "data.train_files"
    return [
        row for source in data_files([str(path)], field=field) for _, row in read_records(source.path, field=field)
    ]


def zst(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


CONTENTS = {
    "a.jsonl": LINES,
    "a.JSONL": LINES,
    "a.ndjson": LINES,
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "crlf.jsonl": LINES.replace(b"\n", b"\r\n"),
    "blank.jsonl": LINES.replace(b"\n", b"\n\n"),
    "array.json": json.dumps(ROWS).encode(),
    "indented.json": b"\n " + json.dumps(ROWS, indent=2).encode() + b"\n",
    "lines.json": LINES,
    "indented_values.json": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.json.GZ": gzip.compress(json.dumps(ROWS).encode()),
    "a.jsonl.zst": zst(LINES),
    "array.json.zst": zst(json.dumps(ROWS).encode()),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("chunk", [7, 2**20])
def test_a_file_is_read_whatever_its_kind(tmp_path, monkeypatch, name, chunk):
    monkeypatch.setattr("datamodules.files.CHUNK_BYTES", chunk)
    (tmp_path / name).write_bytes(CONTENTS[name])
    assert read(tmp_path / name) == ROWS


def test_parquet_is_read_in_upper_case_too(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.PARQUET")
    assert read(tmp_path / "a.PARQUET") == ROWS


def test_records_are_streamed(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS)[:-1] + ", oops]")
    records = read_records(tmp_path / "a.json", field="data.train_files")
    assert [next(records)[1] for _ in ROWS] == ROWS
    with pytest.raises(ValueError, match=r"a\.json:1: broken JSON"):
        next(records)


def test_folders_globs_and_saved_datasets(tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "README.md").write_text("about")
    write_jsonl(folder / "a.jsonl", ROWS[:2])
    write_jsonl(folder / "deep/b.jsonl", ROWS[2:])
    assert read(folder) == ROWS
    assert read(folder / "*.jsonl") == ROWS[:2]
    assert read(folder / "**/*.jsonl") == ROWS
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == ROWS
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"splits holds several splits; name some of \['.*splits/train'\]"):
        read(tmp_path / "splits")
    assert read(tmp_path / "splits/train") == ROWS


def test_files_of_one_stem_are_domains_of_their_own(tmp_path):
    for name in ("one/train.jsonl", "two/train.jsonl", "two/other.jsonl", "two/train.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, ROWS)
    domains = [source.domain for source in data_files([str(tmp_path / "two"), str(tmp_path / "one")], field="f")]
    assert len(set(domains)) == 4
    assert domains[0] == "other"
    assert domains[3] == "one-train"
    (same, again) = data_files([str(tmp_path / "one/train.jsonl")] * 2, field="f")
    assert same.domain == again.domain == "train", "one file listed twice is one domain"


DAMAGED = {
    "utf8.jsonl": (LINES + b'{"messages": "\xff\xfe"}\n', r"utf8\.jsonl:6: not valid UTF-8"),
    "utf8.json": (b'[\n{"a": "\xff"}]', r"utf8\.json:1: not valid UTF-8"),
    "integer.jsonl": (b'{"a": ' + b"1" * 5000 + b"}\n", r"integer\.jsonl:1: broken JSON line: Exceeds the limit"),
    "integer.json": (b'[{"a": ' + b"1" * 5000 + b"}]", r"integer\.json:1: broken JSON: Exceeds the limit"),
    "deep.jsonl": (b"[" * 100_000 + b"\n", r"deep\.jsonl:1: broken JSON line: nested too deeply"),
    "deep.json": (b"[" * 100_000 + b"\n", r"deep\.json:1: broken JSON: nested too deeply"),
    "open.json": (json.dumps(ROWS).encode()[:-1], r"open\.json:1: broken JSON: the array has no end"),
    "comma.json": (b'[{"a": 1}\n {"a": 2}]', r"comma\.json:2: broken JSON: expecting ',' or '\]'"),
    "broken.json": (b'[{"a": 1},\n{"a": 2},\n{oops}]', r"broken\.json:3: broken JSON: Expecting property name"),
    "empty.jsonl": (b"", r"data\.train_files: .*empty\.jsonl is empty"),
    "truncated.parquet": (b"PAR1" + bytes(20) + b"PAR1", r"truncated\.parquet is not a valid parquet file"),
    "cut.jsonl.gz": (gzip.compress(LINES)[:-12], r"data\.train_files: .*cut\.jsonl\.gz is damaged"),
    "not.jsonl.gz": (LINES, r"data\.train_files: .*not\.jsonl\.gz is damaged"),
    "cut.jsonl.zst": (zst(LINES * 99)[:-5], r"data\.train_files: .*cut\.jsonl\.zst is damaged"),
    "not.jsonl.zst": (LINES, r"data\.train_files: .*not\.jsonl\.zst is damaged"),
    "table.csv": (b"a,b\n", r"table\.csv has an unsupported file type"),
    "a.parquet.gz": (b"a", r"a\.parquet\.gz has an unsupported file type"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_that_is_no_data_is_named(tmp_path, name):
    content, message = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_what_is_not_there_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("nowhere.jsonl", "*.jsonl", "empty"):
        with pytest.raises(FileNotFoundError, match=r"data\.train_files: "):
            read(tmp_path / name)
