"""Tensor files: as the safetensors library has them, and what is wrong with a file is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from upit.core.tensor_files import INDEX, TensorFileError, TensorFiles, _fill, check_finite, write_tensors

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(4, 3),
    "b": torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "scalar": torch.tensor(3.0, dtype=torch.float16),
}


def specs(tensors):
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def test_reads_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    files = TensorFiles(tmp_path / "x.safetensors")
    assert {name: (entry.dtype, entry.shape) for name, entry in files.items()} == specs(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(files.read(name), tensor)
    assert torch.equal(files.read("b", slice(1, 4)), TENSORS["b"][1:4])
    assert files.read("b", slice(2, 2)).shape == (0, 2, 3)


def test_the_library_reads_what_is_written(tmp_path):
    write_tensors(tmp_path / "x.safetensors", TENSORS.items(), specs(TENSORS), {"format": "pt"})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize(
    ("names", "count"), [(["c", "a"], 1), (["d", "c", "a"], 1), (["a", "d"], 2), (["b", "a"], 2), (["scalar"], 1)]
)
def test_reads_at_once_what_lies_side_by_side(tmp_path, names, count, monkeypatch):
    tensors = {"a": TENSORS["a"], "c": torch.randn(7), "d": torch.randn(2, 2), **TENSORS}
    write_tensors(tmp_path / "x.safetensors", tensors.items(), specs(tensors))
    files, reads = TensorFiles(tmp_path / "x.safetensors"), []
    monkeypatch.setattr("upit.core.tensor_files._fill", lambda *args: reads.append(1) or _fill(*args))
    found = files.read_all(names)
    assert sorted(found) == sorted(names)
    assert all(torch.equal(found[name], tensors[name]) for name in names)
    assert len(reads) == count


def test_names_who_is_broken_of_several(tmp_path):
    tensors = {"a": torch.ones(3), "b": torch.tensor([1.0, float("nan")]), "c": torch.ones(2)}
    save_file(tensors, tmp_path / "x.safetensors")
    files = TensorFiles(tmp_path / "x.safetensors")
    for _ in range(2):  # what failed once is not taken for checked
        with pytest.raises(TensorFileError, match="tensor 'b' holds NaN"):
            files.read_all(["c", "b", "a"])


def test_shards_are_one(tmp_path):
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    weight_map = {name: f"{name}.safetensors" for name in TENSORS}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    files = TensorFiles(tmp_path)
    assert all(torch.equal(files.read(name), tensor) for name, tensor in TENSORS.items())
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(TensorFileError, match=r"b\.safetensors"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_finds_one_broken_number_anywhere(tmp_path, dtype, value):
    for position in (0, 1, 500, 1000):
        tensor = torch.randn(1001).to(dtype)
        check_finite(tensor, "x", tmp_path)
        tensor[position] = value
        save_file({"x": tensor}, tmp_path / "x.safetensors")
        with pytest.raises(TensorFileError, match=r"x\.safetensors: tensor 'x' holds NaN or infinity"):
            TensorFiles(tmp_path / "x.safetensors").read("x")
        with pytest.raises(TensorFileError, match="holds NaN or infinity"):
            write_tensors(tmp_path / "y.safetensors", [("x", tensor)], {"x": (dtype, (1001,))})
        assert not (tmp_path / "y.safetensors").exists()


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_names_a_truncated_file(tmp_path, keep):
    save_file(TENSORS, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(content[:keep])
    with pytest.raises(TensorFileError, match=r"x\.safetensors"):
        TensorFiles(tmp_path / "x.safetensors")


def test_names_what_it_cannot_read(tmp_path):
    with pytest.raises(TensorFileError, match="pickled weights are not read"):
        TensorFiles(tmp_path)
    save_file({"x": torch.arange(3)}, tmp_path / "x.safetensors")
    with pytest.raises(TensorFileError, match="tensor 'x' has dtype I64"):
        TensorFiles(tmp_path / "x.safetensors")


def test_reads_into_room_that_fits(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    files, room = TensorFiles(tmp_path / "x.safetensors"), torch.zeros(4, 3)
    assert files.read("a", out=room) is room
    assert torch.equal(room, TENSORS["a"])
    with pytest.raises(TensorFileError, match=r"tensor 'b' is torch.bfloat16 \(5, 2, 3\), not torch.float32 \(4, 3\)"):
        files.read("b", out=room)


def test_renamed_is_a_view_of_what_is_named(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    files = TensorFiles(tmp_path / "x.safetensors")
    view = files.renamed({"new": "b"})
    assert list(view) == ["new"]
    assert torch.equal(view.read("new"), TENSORS["b"])
    with pytest.raises(TensorFileError, match="tensor 'nothing' is missing"):
        files.renamed({"new": "nothing"})


def test_rows_that_are_whole_say_nothing_about_the_others(tmp_path):
    tensor = torch.randn(6, 4)
    tensor[5, 2] = float("nan")
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    files = TensorFiles(tmp_path / "x.safetensors")
    assert torch.equal(files.read("x", slice(0, 5)), tensor[:5])
    with pytest.raises(TensorFileError, match="holds NaN or infinity"):
        files.read("x")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_busy_gpu_is_not_waited_for(tmp_path):
    tensors = {name: torch.randn(300, 200) for name in "abc"}
    save_file(tensors, tmp_path / "x.safetensors")
    files, device = TensorFiles(tmp_path / "x.safetensors"), torch.device("cuda", 0)
    files.read("a", device=device)
    torch.cuda._sleep(4 * 10**9)  # two seconds and more
    found = {"a": files.read("a", device=device), **files.read_all("bc", device=device)}
    assert not torch.cuda.current_stream().query()
    for name, tensor in found.items():
        assert torch.equal(tensor.cpu(), tensors[name])
