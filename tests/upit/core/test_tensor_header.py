"""Safetensors headers that lie are refused before anything is allocated; the library's own rules are the reference."""

import json
import random

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from upit.core.tensor_header import TensorFileError, read_header

NAME = "model.layers.0.mlp.gate_proj.weight"


def file_of(header, content=bytes(16)):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + content


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


LIES = {
    "F32 called F16": ({NAME: entry(dtype="F16")}, "needs 8 bytes but has 16"),
    "twice": (
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
        "key 'a' twice",
    ),
    "gap": ({NAME: entry(shape=(2,), offsets=(8, 16))}, "leaves a gap"),
    "nested": (b"[" * 100_000 + b"]" * 100_000, "recursion"),
    "no offsets": ({NAME: {"dtype": "F32", "shape": [4]}}, "lacks dtype, shape or data_offsets"),
    "negative offset": ({NAME: entry(offsets=(-16, 16))}, r"data_offsets \[-16, 16\]"),
    "overlap": ({NAME: entry(), "b": entry()}, "overlaps"),
    "a terabyte": ({NAME: entry(shape=(274877906944,))}, "needs 1099511627776 bytes but has 16"),
    "larger shape": ({NAME: entry(shape=(400,))}, "needs 1600 bytes but has 16"),
    "negative shape": ({NAME: entry(shape=(-2, -2))}, r"shape \[-2, -2\]"),
    "true as a size": ({NAME: entry(shape=(True, 4))}, r"shape \[True, 4\]"),
    "three offsets": ({NAME: entry(offsets=(0, 16, 16))}, "data_offsets"),
    "bytes after": ({NAME: entry(shape=(2,), offsets=(0, 8))}, "bytes after them"),
    "a list": ([1, 2], "is not a JSON object"),
    "a list for a tensor": ({NAME: [1]}, "lacks dtype"),
    "metadata": ({"__metadata__": {"a": 1}, NAME: entry()}, "object of strings"),
    "no tensors": ({}, "holds no tensors"),
    "unknown dtype": ({NAME: entry(dtype=["F32"])}, "dtype"),
    "not UTF-8": (b'{"\xff": 1}', "can't decode"),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie_are_refused(tmp_path, lie):
    header, message = LIES[lie]
    file = tmp_path / "x.safetensors"
    file.write_bytes(file_of(header))
    with pytest.raises(TensorFileError, match=message) as error:
        read_header(file)
    assert "x.safetensors" in str(error.value)
    if isinstance(header, dict) and NAME in header and "metadata" not in lie:
        assert NAME in str(error.value) or "bytes after" in str(error.value) or "overlaps" in str(error.value)


def test_a_header_longer_than_the_file_allocates_nothing(tmp_path):
    for length in (2**63, 10**9, 200):
        (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(100))
        with pytest.raises(TensorFileError, match="longer than the file"):
            read_header(tmp_path / "x.safetensors")


def test_damaged_files_are_read_as_the_library_reads_them_or_refused(tmp_path):
    """One byte of the header changed: the same tensors as the library finds, or the project's own error."""
    tensors = {"a": torch.randn(3, 2), "b": torch.randn(4).bfloat16(), "c": torch.zeros(0, 5)}
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, {"fingerprint": "f"})
    content, draw = file.read_bytes(), random.Random(0)
    header = int.from_bytes(content[:8], "little")
    refused = 0
    for _ in range(400):
        damaged = bytearray(content)
        damaged[draw.randrange(8 + header)] = draw.randrange(256)
        file.write_bytes(damaged)
        try:
            entries, _ = read_header(file)
        except TensorFileError as error:
            assert "x.safetensors" in str(error)  # noqa: PT017
            refused += 1
            continue
        try:
            with safe_open(file, "pt") as library:
                assert set(library.keys()) == entries.keys()
                assert all(tuple(library.get_slice(n).get_shape()) == e.shape for n, e in entries.items())
        except SafetensorError as error:
            pytest.fail(f"read what the library refuses: {error}")
    assert refused > 200
