"""Training checkpoints are read without running code, and say what they hold."""

import os
import pickle
import random

import pytest
import torch
import torch.distributed.checkpoint as dcp

from upit.core.files import FileError
from upit.model.families import moe_config
from upit.model.loading.build import build
from upit.model.loading.identity import config_of, identity_of, read_identity, read_weights


def write(path, model, *, prefix, phase="dense"):
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    identity = identity_of(model, phase=phase, swap_step=7)
    torch.save({"state_dict": state, "upit": identity, "global_step": 5, "epoch": 1}, path)
    return path


@pytest.mark.parametrize("prefix", ["model.", "dense.model.", "moe.model."])
def test_weights_come_back_under_transformers_names(dense, tmp_path, prefix):
    weights = read_weights(write(tmp_path / "a.ckpt", dense, prefix=prefix))
    assert set(weights) == set(dense.state_dict())
    for name, tensor in dense.state_dict().items():
        assert torch.equal(weights[name], tensor)


def test_the_identity_rebuilds_the_model(dense, tmp_path):
    moe = build(moe_config(dense.config, num_experts=4, top_k=3)).eval()
    path = write(tmp_path / "a.ckpt", moe, prefix="moe.model.", phase="moe")
    identity = read_identity(path)
    assert (identity["phase"], identity["num_experts"], identity["top_k"]) == ("moe", 4, 3)
    assert (identity["swap_step"], identity["global_step"], identity["epoch"]) == (7, 5, 1)
    rebuilt = build(config_of(identity)).eval()
    rebuilt.load_state_dict(read_weights(path))
    ids = torch.randint(3, 64, (1, 9))
    assert torch.equal(rebuilt(ids).logits, moe(ids).logits)


@pytest.mark.parametrize(
    "change", [lambda identity: identity.pop("version"), lambda identity: identity.update(version=9)]
)
def test_an_identity_of_another_version_is_refused_with_what_to_do(dense, tmp_path, change):
    path = write(tmp_path / "a.ckpt", dense, prefix="model.")
    content = torch.load(path, weights_only=True)
    change(content["upit"])
    torch.save(content, path)
    with pytest.raises(FileError, match=r"a\.ckpt' has .*format version.* reads 1: train again with this version"):
        read_identity(path)


class Evil:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_a_checkpoint_that_would_run_code_is_refused(dense, tmp_path):
    mark = tmp_path / "code-ran"
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {"model.a": torch.zeros(1)}, "upit": {}, "evil": Evil(mark)}, path)
    for read in (read_identity, read_weights):
        with pytest.raises((pickle.UnpicklingError, ValueError)):
            read(path)
    assert not mark.exists()


@pytest.fixture
def sharded(dense, tmp_path):
    """A checkpoint as ``ModelParallelStrategy`` writes it: a folder."""
    state = {f"dense.model.{name}": tensor for name, tensor in dense.state_dict().items()}
    optimizer = {"state": {"step": torch.tensor(5.0)}, "lr": 1e-3}
    dcp.save({"state_dict": state, "optimizer_0": optimizer}, checkpoint_id=tmp_path / "a.ckpt", no_dist=True)
    torch.save({"upit": identity_of(dense, phase="dense", swap_step=7)}, tmp_path / "a.ckpt/meta.pt")
    return tmp_path / "a.ckpt"


def test_a_sharded_checkpoint_is_read_without_a_process_group(sharded, dense):
    assert read_identity(sharded)["phase"] == "dense"
    weights, expected = read_weights(sharded), dense.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_sharded_checkpoint_that_would_run_code_is_refused(sharded, tmp_path, protocol):
    mark = tmp_path / "code-ran"
    metadata = pickle.loads((sharded / ".metadata").read_bytes())
    metadata.planner_data["evil"] = Evil(mark)
    (sharded / ".metadata").write_bytes(pickle.dumps(metadata, protocol))
    with pytest.raises(ValueError, match=r"loads without running code: \.metadata names posix\.mkdir"):
        read_identity(sharded)
    with pytest.raises(ValueError, match=r"posix\.mkdir"):
        read_weights(sharded)
    assert not mark.exists()


def test_what_is_no_checkpoint_of_upit_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.ckpt"):
        read_identity(tmp_path / "nowhere.ckpt")
    torch.save({"state_dict": {"other": torch.zeros(1)}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of a upit module"):
        read_identity(tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="holds no model weights"):
        read_weights(tmp_path / "foreign.ckpt")
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"text.ckpt"):
        read_identity(tmp_path / "text.ckpt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder"):
        read_identity(tmp_path / "folder")


@pytest.mark.parametrize("kind", ["file", "sharded"])
def test_a_damaged_checkpoint_is_the_projects_own_error(dense, sharded, tmp_path, kind):
    """Bytes changed or cut anywhere: what was saved, or an error that names the checkpoint."""
    if kind == "file":
        path = file = tmp_path / "whole.ckpt"
        state = {f"dense.model.{name}": tensor for name, tensor in dense.state_dict().items()}
        torch.save({"upit": identity_of(dense, phase="dense", swap_step=7), "state_dict": state}, path)
    else:
        path, file = sharded, sharded / ".metadata"
    content, draw = file.read_bytes(), random.Random(0)
    refused = 0
    for i in range(120):
        damaged = bytearray(content)
        if i % 4 == 0:
            damaged = damaged[: draw.randrange(len(damaged))]
        else:  # where names, types and sizes are written
            damaged[draw.randrange(min(len(damaged), 4000))] = draw.randrange(256)
        file.write_bytes(damaged)
        for read in (read_identity, read_weights):
            try:
                read(path)
            except FileError as error:
                refused += 1
                assert str(path) in str(error)  # noqa: PT017
    assert refused > 40


@pytest.mark.parametrize("is_close", [False, True])
def test_a_sharded_checkpoint_allocates_no_more_than_its_files_hold(sharded, is_close):
    present = sum(file.stat().st_size for file in sharded.glob("*.distcp"))
    metadata = pickle.loads((sharded / ".metadata").read_bytes())
    entry = next(e for e in metadata.state_dict_metadata.values() if hasattr(e, "size"))
    entry.size = torch.Size([present // 2 if is_close else 10**12])  # float32: twice what is there
    (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(FileError, match="truncated"):
        read_weights(sharded)


@pytest.mark.parametrize("identity", [7, {}, {"phase": "dense", "num_experts": "8", "swap_step": 1, "config": {}}])
def test_an_identity_of_another_form_is_refused(tmp_path, identity):
    torch.save({"upit": identity}, tmp_path / "a.ckpt")
    with pytest.raises(FileError, match=r"a\.ckpt"):
        read_identity(tmp_path / "a.ckpt")


def test_an_identity_names_no_path_of_the_source(dense, tmp_path):
    dense.config._name_or_path = str(tmp_path)
    identity = identity_of(dense, phase="dense", swap_step=None)
    assert str(tmp_path) not in str(identity)
    assert identity["config"]["return_dict"] is True, "defaults too, which may change between versions"
