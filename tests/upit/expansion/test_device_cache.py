"""What stays on a device between the passes of an expansion, and which devices there are."""

import struct
import time
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from tests.upit.pools import make_pool
from upit.core.files import read_json
from upit.core.gpu import CPU
from upit.core.progress import untracked
from upit.core.tensor_files import TensorFileError, TensorFiles
from upit.expansion import expand as expansion
from upit.expansion.device_cache import Residence, checked_device, residence_on, usual_device, working_memory
from upit.expansion.expand import expand
from upit.expansion.similarity import Functional
from upit.preparation.expert import file_sha256
from upit.preparation.pool import write_once

EVERYTHING = 10**9


@pytest.fixture
def pool(tmp_path):
    return make_pool(tmp_path / "pool", 3)


@pytest.fixture
def reads(monkeypatch):
    """Names of the tensors that are read from files."""
    names, read = [], TensorFiles.read

    def noted(self, name, *args, **kwargs):
        names.append(name)
        return read(self, name, *args, **kwargs)

    monkeypatch.setattr(TensorFiles, "read", noted)
    return names


def run(pool, output, **kwargs):
    return expand(pool.experts, pool.base, num_experts=6, output=output, **kwargs)


def reside(monkeypatch, budget):
    """Let expansions keep tensors, as on a GPU."""
    monkeypatch.setattr(expansion, "residence_on", lambda *_, alone: closing(Residence(CPU, budget)))


def fingerprint(expert):
    return read_json(expert.file.with_suffix(".json"))["fingerprint"]


def test_the_cpu_is_the_default(pool, tmp_path):
    default, said = run(pool, tmp_path / "default"), run(pool, tmp_path / "said", device="cpu")
    assert [expert.sha256 for expert in said.experts] == [expert.sha256 for expert in default.experts]


def test_what_fits_is_read_once(pool, reads):
    expert = replace(pool.experts[0], residence=Residence(CPU, EVERYTHING))
    name, other = sorted(expert.shapes)[:2]
    first = expert.read(name)
    assert torch.equal(first, pool.experts[0].read(name))
    assert expert.read(name) is first
    expert.read(other)
    assert reads == [name, name, other]


def test_what_does_not_fit_is_read_each_time(pool, reads):
    one, other = sorted(pool.base.shapes)[:2]
    residence = Residence(CPU, pool.base.read(one).nbytes)
    expert = replace(pool.experts[0], residence=residence)
    reads.clear()
    tensors = [[expert.read(name) for name in (one, other)] for _ in range(2)]
    assert reads == [one, other, other]
    assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


def test_experts_of_one_file_are_kept_apart(pool):
    first, second = sorted(pool.base.shapes)[:2]
    residence = Residence(CPU, EVERYTHING)
    one, other = (
        replace(pool.experts[0], names={"tensor": name}, residence=residence) for name in (first, second)
    )  # as the experts of a MoE's directory
    assert torch.equal(one.read("tensor"), pool.experts[0].read(first))
    assert torch.equal(other.read("tensor"), pool.experts[0].read(second))


def test_parameters_that_are_not_finite_are_refused(pool):
    broken = pool.experts[0]
    broken.file.write_bytes(broken.file.read_bytes()[:-4] + struct.pack("f", float("nan")))
    last = max(broken.shapes, key=lambda name: broken.tensors[name].start)
    with pytest.raises(TensorFileError, match=f"{last!r} holds NaN or infinity"):
        replace(broken, residence=Residence(CPU, EVERYTHING)).read(last)


@pytest.mark.parametrize("budget", [0, EVERYTHING])
def test_an_expansion_in_residence(pool, tmp_path, monkeypatch, reads, budget):
    expected = run(pool, tmp_path / "out")
    reside(monkeypatch, budget)
    reads.clear()
    found = run(pool, tmp_path / "resident")
    assert len(reads) == 4 * len(pool.base.shapes) or budget == 0, "base and experts once, children never"
    assert [expert.sha256 for expert in found.experts[:3]] == [expert.sha256 for expert in expected.experts[:3]]
    assert [expert.residence for expert in found.experts] == [None] * 6, "what it kept goes with it"
    for child, own in zip(expected.experts[3:], found.experts[3:], strict=True):
        assert all(torch.equal(child.read(name), own.read(name)) for name in child.shapes)
        assert fingerprint(child) != fingerprint(own), "the device draws the masks"


def test_a_crash_loses_no_finished_child(pool, tmp_path, monkeypatch):
    def crash(items, what=""):
        for i, item in enumerate(items):
            if "merge 3" in what and i == 2:
                raise KeyboardInterrupt
            yield item

    reside(monkeypatch, EVERYTHING)
    with pytest.raises(KeyboardInterrupt):
        run(pool, tmp_path / "out", track=crash)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    before = [file.stat().st_mtime_ns for file in files]
    assert [file.name for file in files] == ["merged_00.safetensors", "merged_01.safetensors"]
    again, fresh = run(pool, tmp_path / "out"), run(pool, tmp_path / "fresh")
    assert [file.stat().st_mtime_ns for file in files] == before
    assert [expert.sha256 for expert in again.experts] == [expert.sha256 for expert in fresh.experts]


def test_files_are_written_in_the_background_and_complete_at_the_end(tmp_path, monkeypatch):
    def slowly(*args):
        time.sleep(0.1)
        return write_once(*args)

    monkeypatch.setattr("upit.expansion.device_cache.write_once", slowly)
    file, tensor = tmp_path / "child.safetensors", torch.ones(3)
    with closing(Residence(CPU, EVERYTHING)) as residence:
        residence.write_once(file, [("tensor", tensor)], {"tensor": (torch.float32, (3,))}, "fingerprint")
        assert not file.exists()
    assert file.exists()
    assert residence.written(untracked) == {file: file_sha256(file)}


def test_a_file_that_cannot_be_written_ends_the_expansion(pool, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    reside(monkeypatch, EVERYTHING)
    monkeypatch.setattr("upit.expansion.device_cache.write_once", full)
    with pytest.raises(OSError, match="No space left"):
        run(pool, tmp_path / "out")


def test_losses_are_those_of_children_on_disk(pool, tmp_path, monkeypatch):
    def score(expert):
        assert file_sha256(expert.file) == expert.sha256
        return torch.stack([expert.get_slice(name)[:].abs().mean() for name in sorted(expert.shapes)])

    reside(monkeypatch, EVERYTHING)
    assert len(run(pool, tmp_path / "out", similarity=Functional(), score=score).experts) == 6


def test_working_memory_is_of_the_largest_tensor():
    assert working_memory({"a": (10, 10), "b": (5,)}, 16) == 2 * 4 * 100 * 19


@pytest.mark.parametrize("name", ["tpu", "mps", "cpu:0", "cuda:", "cuda:x", "cuda:-1", ""])
def test_other_devices_are_refused(name):
    with pytest.raises(ValueError, match=f"expansion_device='{name}' is no device"):
        checked_device(name, "expansion_device")


def test_a_gpu_that_is_not_there_is_refused(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device='cuda': no CUDA device is here; use cpu"):
        run(pool, tmp_path / "out", device="cuda")


def test_a_gpu_without_triton_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("upit.expansion.device_cache.HAS_TRITON", False)
    with pytest.raises(ValueError, match="needs Triton"):
        checked_device("cuda", "device")


def test_nothing_stays_on_a_gpu_that_also_scores(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    for alone, expected in ((True, 10**9 - working_memory({"a": (5, 7)}, 16)), (False, 0)):
        with residence_on(torch.device("cuda"), {"a": (5, 7)}, 16, alone=alone) as residence:
            assert residence._free == expected


def test_the_gpu_that_trains_expands_where_it_has_room_for_the_work(monkeypatch):
    needed = working_memory({"a": (5, 7)}, 16)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr("upit.expansion.device_cache.HAS_TRITON", True)
    for free, expected in ((needed + 1, "cuda"), (needed, "cpu")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        assert usual_device(torch.device("cuda"), {"a": (5, 7)}, 16) == expected
    assert usual_device(CPU, {"a": (5, 7)}, 16) == "cpu"
    monkeypatch.setattr("upit.expansion.device_cache.HAS_TRITON", False)
    assert usual_device(torch.device("cuda"), {"a": (5, 7)}, 16) == "cpu"
