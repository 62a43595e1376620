"""Copies that the host does not wait for hold what was there when they were asked for."""

import pytest
import torch

from upit.core.gpu import host_copy, wait_for_copies

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
