"""The source's generation settings through a whole run: in no score, in every export."""

import json

import pytest
import torch
from lightning import Trainer
from transformers import GenerationConfig

from lightning_modules import DenseModule, MoEModule, UpITModule
from tests.conftest import TINY, every_step_checkpoints, make_callbacks, make_trainer
from upit.model.loading.build import build, scratch_config
from upit.offline.export_checkpoint import export_checkpoint

SETTINGS = {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2}


@pytest.fixture
def source(data, tmp_path):
    torch.manual_seed(0)
    model = build(scratch_config(TINY, data.tokenizer))
    eos = [data.tokenizer.eos_token_id, 5]
    model.generation_config = GenerationConfig(**SETTINGS, eos_token_id=eos)
    model.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_settings_of_the_source_are_in_every_export_and_in_no_score(source, data, tmp_path, make_data):
    run = tmp_path / "run"
    module = UpITModule(DenseModule(model=str(source), lr=1e-3), MoEModule(num_experts=4, top_k=2, lr=1e-3))
    trainer = make_trainer(run, [*make_callbacks(), every_step_checkpoints(run)])
    trainer.fit(module, datamodule=make_data())
    data.tokenizer.save_pretrained(run / "tokenizer")
    outputs = [run / "export"]
    for step in (3, 9):
        outputs.append(export_checkpoint(run / f"checkpoints/step={step}.ckpt", run / f"export-of-{step}"))
    for output in outputs:
        written = json.loads((output / "generation_config.json").read_text())
        assert {name: written[name] for name in SETTINGS} == SETTINGS, output
        assert written["eos_token_id"] == [data.tokenizer.eos_token_id, 5]

    within = json.loads((run / "report.json").read_text())["stages"]["final"]["domains"]
    checkpoint = run / "checkpoints/step=10.ckpt"
    again = UpITModule(DenseModule(model=str(source)), MoEModule(num_experts=4, top_k=2))
    tester: Trainer = make_trainer(run, [], logger=False)
    tester.ckpt_path = str(checkpoint)  # as the command line tells it
    (found,) = tester.test(again, datamodule=make_data(), ckpt_path=str(checkpoint), verbose=False, weights_only=True)
    for domain, scores in within.items():
        assert found[f"test/exact_match/{domain}"] == pytest.approx(scores["exact_match"])
        assert found[f"test/loss/{domain}"] == pytest.approx(scores["loss"], rel=1e-4)
