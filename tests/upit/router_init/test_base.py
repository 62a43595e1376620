"""Routers that come from a file."""

import pytest
import torch
from safetensors.torch import save_file

from tests.upit.tiny import dense_config
from upit.router_init import FromFile


@pytest.fixture
def saved(tmp_path):
    def save(**tensors) -> FromFile:
        save_file(tensors, tmp_path / "router.safetensors")
        return FromFile(str(tmp_path / "router.safetensors"))

    return save


def test_is_what_the_file_holds(saved):
    router_DEH = torch.randn(2, 4, 32)
    router = saved(router=router_DEH)
    router.check(dense_config("llama"), 4)
    assert torch.equal(router.weights(dense_config("llama"), 4), router_DEH)


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({"router": torch.zeros(2, 3, 32)}, r"\(2, 3, 32\)"),
        ({"router": torch.zeros(1, 4, 32)}, r"\(1, 4, 32\)"),
        ({"other": torch.zeros(2, 4, 32)}, "None"),
    ],
    ids=["experts", "layers", "no router"],
)
def test_another_shape_is_refused_before_the_run(saved, tensors, found):
    router = saved(**tensors)
    with pytest.raises(ValueError, match=rf"FromFile\.path=.* of shape {found}, the model needs \(2, 4, 32\)"):
        router.check(dense_config("llama"), 4)


def test_no_such_file(tmp_path):
    with pytest.raises(ValueError, match=r"FromFile\.path='.*none' *: tensor file"):
        FromFile(str(tmp_path / "none"))
