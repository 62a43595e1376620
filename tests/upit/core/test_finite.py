"""NaN and infinity in weights and in values that are read later."""

import math

import pytest
import torch

from upit.core.finite import LAG, FiniteWatch, NotFiniteError, not_finite

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_tensor_that_is_not_finite_is_named(dtype, value):
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(4, 4, dtype=dtype), "c": torch.ones(3), "ids": torch.arange(3)}
    tensors["none"] = torch.empty(0, 3)
    assert not_finite(tensors) == []
    tensors["b"][1, 2] = value
    assert not_finite(tensors) == ["b"]
    tensors["c"][0] = value
    assert not_finite(tensors) == ["b", "c"]


def failing(seen):
    def fail(name, step):
        seen.append((name, step))
        raise NotFiniteError(f"{name} {step}")

    return fail


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_bad_value_fails_and_goes_on_failing(device, value):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    seen = []
    watch = FiniteWatch(failing(seen))
    lag = LAG if device == "cuda" else 0
    values = [1.0, value, *[1.0] * lag]
    for step, each in enumerate(values[:-1], 1):
        watch.add("loss", step, torch.tensor(each, device=device))
    with pytest.raises(NotFiniteError, match="loss 2"):
        watch.add("loss", len(values), torch.tensor(values[-1], device=device))
    for _ in range(2):
        with pytest.raises(NotFiniteError, match="loss 2"):
            watch.settle()


@pytest.mark.parametrize("device", DEVICES)
def test_settling_reads_what_is_on_its_way(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    watch = FiniteWatch(failing([]))
    watch.add("loss", 1, torch.tensor(1.0, device=device))
    watch.settle()
    if device == "cuda":
        watch.add("norm", 2, torch.tensor(math.inf, device=device))
        with pytest.raises(NotFiniteError, match="norm 2"):
            watch.settle()
