"""Adaptive harvest: by distance travelled, the same after a resume."""

import json

import pytest

from callbacks import ExpertHarvest
from tests.conftest import every_step_checkpoints, make_callbacks, make_module, make_trainer
from upit.preparation.pool import Pool
from upit.preparation.sources import Harvested
from upit.report.run import read_lineage


def fit(make_data, run, harvest, upcycling=None, **kwargs):
    callbacks = make_callbacks(harvest, {"at_step": 8, **(upcycling or {})}, report=False)
    module = make_module()
    make_trainer(run, [*callbacks, every_step_checkpoints(run)], max_steps=9).fit(
        module, datamodule=make_data(), **kwargs
    )
    return [entry["step"] for entry in json.loads((run / "experts/manifest.json").read_text())["experts"]]


def moved(pool, before, after):
    one, other = pool.at_step(before), pool.at_step(after)
    squares = sum(float((other.read(name) - one.read(name)).square().sum()) for name in one.shapes)
    return (squares / sum(float(one.read(name).square().sum()) for name in one.shapes)) ** 0.5


def test_harvests_once_far_enough(make_data, tmp_path):
    every = fit(make_data, tmp_path / "every", {"every_n_steps": 1})
    pool = Pool(tmp_path / "every/experts")
    distance = moved(pool, 0, 3) * 0.999
    expected, last = [], 0
    for step in every:
        if moved(pool, last, step) >= distance or step == every[-1]:
            expected.append(step)
            last = step
    found = fit(make_data, tmp_path / "far", {"every_n_steps": 1, "min_distance": distance})
    assert found == expected
    assert 3 in found
    assert len(found) < len(every)


@pytest.mark.parametrize(("interval", "distance", "skips"), [(1, 0.02, True), (2, 1e-6, False)])
def test_resume_harvests_the_same(make_data, tmp_path, interval, distance, skips):
    harvest = {"every_n_steps": interval, "min_distance": distance}
    whole = fit(make_data, tmp_path / "run", harvest)
    assert (len(whole) < 8 // interval) == skips
    files = {file.name: file.read_bytes() for file in (tmp_path / "run/experts").glob("step*")}
    again = fit(
        make_data, tmp_path / "run", harvest, ckpt_path=tmp_path / "run/checkpoints/step=4.ckpt", weights_only=True
    )
    assert again == whole
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "run/experts").glob("step*")}


@pytest.mark.parametrize(("keep", "steps"), [("all", [6, 8]), ("first_half", [4, 6, 8])])
def test_too_great_a_distance_leaves_as_many_as_the_upcycling_needs(make_data, tmp_path, keep, steps):
    source = {"source": Harvested(keep)}
    with pytest.warns(
        UserWarning, match=rf"min_distance=9 is too far: the experts moved 0\.\d+ since step 0\. .* {steps[0]} "
    ):
        assert fit(make_data, tmp_path, {"every_n_steps": 2, "min_distance": 9}, source) == steps
    assert len(read_lineage(tmp_path / "upcycling/lineage.json")) == 4


def test_refuses():
    with pytest.raises(ValueError, match=r"min_distance=0.0 must be positive"):
        ExpertHarvest(min_distance=0.0)
