"""Copies that the host does not wait for, and the names of ops."""

import pytest
import torch

from upit.gpu import host_copy, op_name, wait_for_copies

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_a_copy_is_of_the_tensor_as_it_was(device, dtype):
    tensor = torch.randn(2000, 5000, device=device)
    expected = tensor.to("cpu", dtype, copy=True)
    copy = host_copy(tensor, dtype)
    wait = wait_for_copies()
    tensor.zero_()
    wait()
    assert copy.dtype == dtype
    assert copy.device.type == "cpu"
    assert torch.equal(copy, expected)


def test_an_op_whose_code_changes_is_another_op(tmp_path):
    """Else torch.compile would take the earlier one from its cache on disk (found so on 26 November 2026)."""
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    first.write_text("FACTOR = 2")
    second.write_text("")
    name = op_name("experts", str(first), str(second))
    assert name.startswith("upit::experts_")
    assert op_name("experts", str(first), str(second)) == name
    second.write_text("FACTOR = 3")
    assert op_name("experts", str(first), str(second)) != name
