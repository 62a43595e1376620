"""The pool on disk: what is stored comes back, every defect names its file, a crash leaves no half file."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.upit.conftest import expert_tensors, shift
from upit.core.files import FileError, read_json, write_json
from upit.core.tensor_files import TensorFileError
from upit.preparation.expert import Expert, file_sha256
from upit.preparation.pool import Pool, write_expert, write_once


@pytest.fixture
def pool(dense, make_pool):
    return make_pool(dense, 3)


def test_comes_back_as_stored(pool, dense):
    found = Pool.load(pool.directory)
    found.verify()
    assert [expert.step for expert in found.experts] == [10, 20, 30]
    assert found.experts[0].epoch == 0.25
    assert found.experts[0].metrics == {"val/loss": 1.0}
    base = expert_tensors(dense)
    for i, expert in enumerate(found.experts):
        stored = shift(base, 0.1, seed=i)
        assert expert.shapes == {name: tuple(t.shape) for name, t in stored.items()}
        for name, tensor in stored.items():
            assert torch.equal(expert.read(name), tensor)
            assert torch.equal(expert.get_slice(name)[2:5,], tensor[2:5])


def test_the_manifest_says_what_others_read(pool):
    manifest = json.loads((pool.directory / "manifest.json").read_text())
    assert manifest["base"]["sha256"] == file_sha256(pool.directory / "base.safetensors")
    for entry in manifest["experts"]:
        assert set(entry) == {"file", "step", "epoch", "sha256", "dtype", "base", "metrics"}
        assert entry["sha256"] == file_sha256(pool.directory / entry["file"])
        assert entry["base"] == manifest["base"]["sha256"]
        assert entry["dtype"] == "float32"


def test_files_are_plain_safetensors(pool, dense):
    loaded = load_file(pool.experts[0].file)
    assert set(loaded) == set(expert_tensors(dense))


def test_the_same_step_again_replaces_it(pool, dense):
    again = shift(expert_tensors(dense), 0.5, seed=99)
    pool.add(again, step=20, epoch=0.5, metrics={})
    assert [expert.step for expert in pool.experts] == [10, 20, 30]
    name = next(iter(again))
    assert torch.equal(pool.experts[1].read(name), again[name])
    pool.verify()


def test_experts_of_later_steps_can_be_forgotten(pool):
    pool.forget_after(20)
    assert [expert.step for expert in Pool.load(pool.directory).experts] == [10, 20]
    pool.verify()


def test_a_new_base_forgets_older_experts(pool, dense):
    pool.set_base(expert_tensors(dense))
    assert pool.experts == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_round_trips(tmp_path, dtype):
    tensors = {"a": torch.randn(3, 4).to(dtype), "b": torch.randn(5).to(dtype)[::2]}
    specs = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    sha256 = write_expert(tmp_path / "e.safetensors", tensors.items(), specs)
    expert = Expert(tmp_path / "e.safetensors", sha256, str(dtype).removeprefix("torch."))
    expert.check()
    for name, tensor in tensors.items():
        assert torch.equal(expert.read(name), tensor)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_file_is_hashed_once_a_process_until_it_changes(pool, monkeypatch):
    pool.verify()
    with monkeypatch.context() as patch:
        patch.setattr("upit.preparation.expert.hashlib.file_digest", lambda *_: pytest.fail("read again"))
        pool.verify()
    flip(pool.directory / "base.safetensors")
    with pytest.raises(TensorFileError, match="the manifest says"):
        pool.verify()


def other_shape(file):
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "is missing"),
        (truncate, "truncated"),
        (lambda file: file.write_bytes(b""), "truncated"),
        (flip, "the manifest says"),
        (other_shape, "the manifest says"),
    ],
    ids=["missing", "truncated", "empty", "changed", "other_shape"],
)
@pytest.mark.parametrize("name", ["base.safetensors", "step_0000020.safetensors"])
def test_a_damaged_file_is_named(pool, damage, message, name):
    damage(pool.directory / name)
    with pytest.raises(TensorFileError, match=message) as caught:
        pool.verify()
    assert name in str(caught.value)


def test_an_expert_of_another_shape_is_named(pool, dense):
    tensors = expert_tensors(dense)
    name = next(iter(tensors))
    pool.add({**tensors, name: tensors[name][:-1]}, step=40, epoch=1.0, metrics={})
    with pytest.raises(TensorFileError, match="step_0000040") as caught:
        pool.verify()
    assert name in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_and_leave_the_pool_as_it_was(pool, dense, value):
    tensors = expert_tensors(dense)
    name = list(tensors)[-1]
    tensors[name][0, 0] = value
    with pytest.raises(TensorFileError, match="NaN or infinity") as caught:
        pool.add(tensors, step=40, epoch=1.0, metrics={})
    assert "step_0000040" in str(caught.value)
    assert name in str(caught.value)
    assert not (pool.directory / "step_0000040.safetensors").exists()
    assert [expert.step for expert in Pool.load(pool.directory).experts] == [10, 20, 30]
    pool.verify()


def test_a_crash_while_writing_leaves_no_half_file(pool, dense):
    tensors = expert_tensors(dense)
    specs = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}

    def crashing():
        for i, item in enumerate(tensors.items()):
            if i == 2:
                raise KeyboardInterrupt
            yield item

    path = pool.directory / "new.safetensors"
    with pytest.raises(KeyboardInterrupt):
        write_expert(path, crashing(), specs)
    assert not path.exists()
    before = pool.experts[0].file.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_expert(pool.experts[0].file, crashing(), specs)
    assert pool.experts[0].file.read_bytes() == before
    write_expert(path, tensors.items(), specs)
    assert path.exists()


def test_tensors_that_differ_from_their_specs_are_refused(tmp_path):
    specs = {"a": (torch.float32, (2,))}
    for name, tensor in (("b", torch.zeros(2)), ("a", torch.zeros(3)), ("a", torch.zeros(2).bfloat16())):
        with pytest.raises(TensorFileError, match=r"e\.safetensors"):
            write_expert(tmp_path / "e.safetensors", [(name, tensor)], specs)
    with pytest.raises(ValueError, match="zip"):
        write_expert(tmp_path / "e.safetensors", [], specs)
    assert not (tmp_path / "e.safetensors").exists()


def test_a_folder_without_a_manifest_is_named(tmp_path):
    with pytest.raises(TensorFileError, match=r"manifest\.json is missing") as caught:
        Pool.load(tmp_path / "nowhere")
    assert "nowhere" in str(caught.value)


@pytest.mark.parametrize("where", ["base", "expert"])
@pytest.mark.parametrize("field", ["file", "rest"])
@pytest.mark.parametrize("name", ["../base.safetensors", "/etc/passwd", "a/../../b", "..", "", 7])
def test_a_manifest_names_files_of_its_folder_only(pool, where, field, name):
    manifest = json.loads(pool.manifest_file.read_text())
    (manifest["base"] if where == "base" else manifest["experts"][1])[field] = name
    pool.manifest_file.write_text(json.dumps(manifest))
    with pytest.raises(FileError, match=r"manifest\.json.*(not a file of this folder|expected str)"):
        Pool.load(pool.directory).experts  # noqa: B018
    with pytest.raises(FileError):
        Pool.load(pool.directory).base  # noqa: B018


@pytest.mark.parametrize(
    "damage",
    [
        {"experts": {}},
        {"experts": [7]},
        {"base": []},
        {"version": "1"},
        {"experts": [{"file": "base.safetensors"}]},
    ],
)
def test_a_damaged_manifest_is_named(pool, damage):
    manifest = json.loads(pool.manifest_file.read_text())
    pool.manifest_file.write_text(json.dumps(manifest | damage))
    with pytest.raises(FileError, match=r"manifest\.json"):
        Pool.load(pool.directory).experts  # noqa: B018


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda manifest: manifest["experts"][1].update(metrics={"val/loss": None}),
            r"experts\[1\]\.metrics\.val/loss",
        ),
        (lambda manifest: manifest["experts"].append(manifest["experts"][0]), "names a file twice"),
        (lambda manifest: manifest.update(pruned=["10"]), r"pruned is \['10'\], expected a list of steps"),
        (lambda manifest: manifest["experts"][1].update(rest="base.safetensors"), "no field 'rest_sha256'"),
    ],
    ids=["metric", "twice", "pruned", "rest"],
)
def test_a_manifest_that_contradicts_itself_is_named(pool, damage, message):
    manifest = json.loads(pool.manifest_file.read_text())
    damage(manifest)
    pool.manifest_file.write_text(json.dumps(manifest))
    with pytest.raises(FileError, match=rf"manifest\.json.*{message}"):
        Pool.load(pool.directory).experts  # noqa: B018


@pytest.mark.parametrize("field", ["step", "epoch", "sha256", "dtype", "metrics", "origin"])
def test_a_manifest_with_a_value_of_another_type_is_named(pool, field):
    manifest = json.loads(pool.manifest_file.read_text())
    manifest["experts"][2][field] = [1]
    pool.manifest_file.write_text(json.dumps(manifest))
    with pytest.raises(FileError, match=rf"manifest\.json.*experts\[2\]\.{field} is \[1\]"):
        Pool.load(pool.directory).experts  # noqa: B018


def test_a_damaged_file_of_the_other_parameters_is_named(pool, dense):
    rest = {"model.norm.weight": dense.model.norm.weight.detach()}
    pool.add(expert_tensors(dense), step=40, epoch=1.0, metrics={}, rest=rest)
    pool.verify()
    flip(pool.directory / "step_0000040.rest.safetensors")
    with pytest.raises(TensorFileError, match=r"step_0000040\.rest\.safetensors.*the manifest says"):
        pool.verify()


@pytest.mark.parametrize("version", [None, 99])
def test_a_manifest_of_another_version_is_refused_with_what_to_do(pool, version):
    manifest = read_json(pool.manifest_file)
    write_json(pool.manifest_file, {**manifest, "version": version})
    with pytest.raises(FileError, match=r"manifest\.json' has .*format version.* reads 1: make it again"):
        Pool.load(pool.directory).verify()


def make_once(path, value: float, fingerprint: str = "key") -> torch.Tensor:
    write_once(path, iter([("a", torch.full((3,), value))]), {"a": (torch.float32, (3,))}, fingerprint)
    return load_file(path)["a"]


def test_a_finished_file_is_taken_as_it_is_under_its_fingerprint(tmp_path):
    path = tmp_path / "made.safetensors"
    assert make_once(path, 1.0).tolist() == [1.0] * 3
    assert make_once(path, 2.0).tolist() == [1.0] * 3
    assert make_once(path, 2.0, "another").tolist() == [2.0] * 3


def version_of_record(file):
    write_json(file.with_suffix(".json"), {**read_json(file.with_suffix(".json")), "version": 0})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip, True),
        (truncate, True),
        (lambda file: file.unlink(), False),
        (lambda file: file.with_suffix(".json").unlink(), False),
        (lambda file: file.with_suffix(".json").write_bytes(b"\xff{"), False),
        (version_of_record, False),
    ],
    ids=["flipped bit", "truncated", "missing", "no record", "damaged record", "older record"],
)
def test_a_damaged_file_is_made_again_and_said(tmp_path, damage, said, recwarn):
    path = tmp_path / "made.safetensors"
    make_once(path, 1.0)
    damage(path)
    assert make_once(path, 2.0).tolist() == [2.0] * 3
    assert [str(warning.message).endswith("It is made again") for warning in recwarn] == [True] * said
    assert make_once(path, 3.0).tolist() == [2.0] * 3


def test_what_is_pruned_is_listed_and_gone(pool):
    files = {expert.step: expert.file for expert in pool.experts}
    freed = files[10].stat().st_size + files[20].stat().st_size
    assert pool.pruned == []
    assert pool.prune([10, 20]) == freed
    again = Pool.load(pool.directory)
    assert again.pruned == [10, 20]
    assert [expert.step for expert in again.experts] == [30]
    assert [step for step, file in files.items() if file.exists()] == [30]
    again.verify()
    with pytest.raises(TensorFileError, match=r"steps \[10, 20\] were pruned"):
        again.check_steps([10, 20, 30])
    with pytest.raises(TensorFileError, match=r"steps \[10, 25\] are not in its manifest"):
        again.check_steps([10, 25])


def test_an_expert_that_is_harvested_again_is_not_pruned_any_more(pool, dense):
    pool.prune([10, 20])
    pool.add(shift(expert_tensors(dense), 0.1, seed=5), step=10, epoch=0.25, metrics={})
    assert pool.pruned == [20]
    pool.check_steps([10, 30])


def test_experts_from_elsewhere_become_a_pool(pool, tmp_path):
    gathered = Pool(tmp_path / "gathered")
    found = gathered.gather(pool.base, pool.experts[1:])
    again = Pool.load(gathered.directory)
    again.verify()
    assert [expert.file for expert in again.experts] == [expert.file for expert in found]
    assert again.base.step == 0
    for old, new in zip([pool.base, *pool.experts[1:]], [again.base, *again.experts], strict=True):
        assert new.file.parent == gathered.directory
        assert (new.step, new.metrics, new.origin) == (old.step, old.metrics, old.origin)
        assert all(torch.equal(new.read(name), old.read(name)) for name in old.shapes)
    manifest = json.loads(gathered.manifest_file.read_text())
    assert {entry["base"] for entry in manifest["experts"]} == {again.base.sha256}
