"""What the modules refuse, and which checkpoints they take."""

import copy
import math
import re
import shutil
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch._dynamo.backends.debugging import aot_eager
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig

from datamodules.reasoning_gym import train_tokenizer
from lightning_modules import DenseModule, MoEModule, UpITModule
from tests.conftest import TINY, every_step_checkpoints, make_callbacks, make_module, make_trainer
from upit.model.families import moe_config
from upit.model.loading.build import build
from upit.model.routers import last_routing
from upit.router_init import RandomRouter

FAST = {"compile": True, "gradient_checkpointing": True}


@pytest.mark.parametrize("kwargs", [{}, {"model": "a", "config": TINY}])
def test_a_dense_module_starts_from_one_thing(kwargs):
    with pytest.raises(ValueError, match="give one of model and config"):
        DenseModule(**kwargs)


@pytest.mark.parametrize(
    "wrong",
    [{"lr": -1.0}, {"weight_decay": -0.1}, {"warmup_fraction": 1.5}, {"betas": (0.9, 1.0)}, {"max_new_tokens": 0}],
    ids=str,
)
def test_settings_of_a_later_phase_are_refused_at_once(wrong):
    ((field, value),) = wrong.items()
    with pytest.raises(ValueError, match=re.escape(f"MoEModule.{field}={value} must ")):
        MoEModule(**wrong)


def test_graphs_exclude_what_they_cannot_hold(make_data, tmp_path):
    with pytest.raises(ValueError, match="cuda_graphs and gradient_checkpointing exclude"):
        MoEModule(cuda_graphs=True, gradient_checkpointing=True)
    two = make_trainer(tmp_path, [], logger=False, devices=2, strategy="ddp")
    sharded = make_trainer(tmp_path, [], logger=False, strategy=ModelParallelStrategy(1, 1))
    sharded.strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 1)}
    for trainer, message in ((two, "2 with DDPStrategy"), (sharded, "1 with ModelParallelStrategy")):
        module = make_module(cuda_graphs=True)
        module.trainer = trainer
        with pytest.raises(ValueError, match=f"cuda_graphs=True is for one device without a strategy.* {message}"):
            module.setup("fit")
    with pytest.raises(ValueError, match="cuda_graphs=True needs batches of one shape: set data"):
        fit(make_module(cuda_graphs=True), make_data(packing=False), tmp_path)


def test_an_upcycled_moe_is_not_loaded_too():
    with pytest.raises(ValueError, match=r"moe\.model='some/moe'.*leave it out"):
        UpITModule(DenseModule(config=TINY), MoEModule(model="some/moe"))


def test_a_moe_alone_needs_a_model(make_data, tmp_path):
    with pytest.raises(ValueError, match="MoEModule has model=None"):
        make_trainer(tmp_path, [], logger=False).fit(MoEModule(), datamodule=make_data())


def fit(module, data, run):
    make_trainer(run, [], logger=False, max_steps=1).fit(module, datamodule=data)


def test_an_unsupported_architecture_is_named_with_the_supported_ones(make_data, tmp_path):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=320)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"model_type='gpt2'.*supported.*'llama'"):
        fit(DenseModule(model=str(tmp_path / "gpt2")), make_data(), tmp_path)


def test_a_dense_model_is_no_moe_and_the_other_way_round(finished, make_data, tmp_path):
    run, _, _ = finished
    from upit.offline.export_checkpoint import export_checkpoint

    dense = export_checkpoint(run / "checkpoints/step=4.ckpt", tmp_path / "dense")
    with pytest.raises(ValueError, match=r"is a 'llama', no MoE; supported: .*'mixtral'"):
        fit(MoEModule(model=str(dense)), make_data(), tmp_path)
    with pytest.raises(ValueError, match="model_type='mixtral'"):
        fit(DenseModule(model=str(run / "export")), make_data(), tmp_path)


def test_mixed_tokenizers_are_refused(finished, make_data, tmp_path):
    run, _, _ = finished
    from upit.offline.export_checkpoint import export_checkpoint

    dense = export_checkpoint(run / "checkpoints/step=4.ckpt", tmp_path / "dense")
    with pytest.raises(ValueError, match=r"the tokenizer has 400 tokens but .* embeds 320.*data\.tokenizer"):
        fit(DenseModule(model=str(dense)), make_data(vocab_size=400), tmp_path)


def test_a_tokenizer_of_equal_size_from_another_model_is_refused(finished, make_data, tmp_path):
    from upit.offline.export_checkpoint import export_checkpoint

    run, _, _ = finished
    dense = export_checkpoint(run / "checkpoints/step=4.ckpt", tmp_path / "dense")
    other = train_tokenizer(
        ["Because it is so, say the many reasons of quick brown foxes that jump over lazy dogs " * 9],
        vocab_size=320,
        chat_template=None,
    )
    own = AutoTokenizer.from_pretrained(dense)
    assert (len(other), other.eos_token_id) == (len(own), own.eos_token_id)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"the tokenizer's id \d+ is .* belongs to another model; set data"):
        fit(DenseModule(model=str(dense)), make_data(tokenizer=str(tmp_path / "other")), tmp_path / "a")
    fit(DenseModule(model=str(dense)), make_data(tokenizer=str(dense)), tmp_path / "b")
    for file in dense.glob("tokenizer*"):
        file.unlink()
    fit(DenseModule(model=str(dense)), make_data(tokenizer=str(tmp_path / "other")), tmp_path / "c")


def test_weights_that_need_unpickling_are_refused(make_data, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**TINY, vocab_size=320))
    model.config.save_pretrained(tmp_path / "old")
    torch.save(model.state_dict(), tmp_path / "old/pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        fit(DenseModule(model=str(tmp_path / "old")), make_data(), tmp_path)


@pytest.mark.parametrize(
    ("step", "make", "message"),
    [
        (4, lambda run: MoEModule(model=str(run / "export")), "holds a dense model but MoEModule is moe"),
        (9, lambda _: DenseModule(config=TINY), "holds a moe model but DenseModule is dense"),
        (9, lambda _: make_module(num_experts=8), "the checkpoint has 4 experts but num_experts=8"),
        (9, lambda _: make_module(top_k=1), "the checkpoint routes to 2 experts but top_k=1"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(finished, make_data, tmp_path, step, make, message):
    run, _, _ = finished
    trainer = make_trainer(tmp_path, [], logger=False)
    with pytest.raises(ValueError, match=message):
        trainer.validate(
            make(run), datamodule=make_data(), ckpt_path=run / f"checkpoints/step={step}.ckpt", verbose=False
        )


def test_a_checkpoint_of_someone_else_is_refused(make_data, tmp_path):
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, tmp_path / "foreign.ckpt")
    trainer = make_trainer(tmp_path, [], logger=False)
    with pytest.raises(ValueError, match="no checkpoint of a upit module"):
        trainer.fit(make_module(), datamodule=make_data(), ckpt_path=tmp_path / "foreign.ckpt")


def test_a_resumed_dense_phase_obeys_the_swap_of_its_config(finished, make_data, tmp_path):
    """Not the one it was saved with, silently."""
    run, _, _ = finished
    shutil.copytree(run, tmp_path / "run")
    module = make_module()
    callbacks = make_callbacks(upcycling={"at_step": 8, "seed_fraction": 0.1, "router": RandomRouter()}, report=False)
    trainer = make_trainer(tmp_path / "run", callbacks)
    trainer.fit(module, datamodule=make_data(), ckpt_path=tmp_path / "run/checkpoints/step=4.ckpt", weights_only=True)
    assert module.phase == "moe"
    assert module.swap_step == 8


@pytest.mark.parametrize(("step", "phase"), [(4, "dense"), (9, "moe")])
def test_load_from_checkpoint_needs_no_trainer(finished, step, phase):
    run, _, _ = finished
    fresh = make_module()
    module = UpITModule.load_from_checkpoint(
        run / f"checkpoints/step={step}.ckpt", dense=fresh.dense, moe=fresh.moe, weights_only=True
    )
    assert module.phase == phase
    saved = torch.load(run / f"checkpoints/step={step}.ckpt", weights_only=True)["state_dict"]
    assert module.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in module.state_dict().items())


def test_the_seed_alone_decides_on_weights_from_scratch(make_data, tmp_path):
    """Not what was drawn from torch's generator before."""
    models = []
    for drawn in (0, 7):
        module = DenseModule(config=TINY, lr=0.0)
        L.seed_everything(3)
        torch.rand(drawn)
        fit(module, make_data(), tmp_path)
        models.append(module.lm.state_dict())
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


class Frequencies(L.Callback):
    """The dtypes of the rotary frequencies and of the weights, by phase."""

    def __init__(self):
        self.seen = set()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        rotary = module.lm.model.rotary_emb
        dtypes = {buffer.dtype for buffer in rotary.buffers()}
        self.seen |= {(module.phase, dtype, next(module.lm.parameters()).dtype) for dtype in dtypes}


def test_bf16_true_rounds_no_rotary_frequencies(make_data, tmp_path):
    """Before the swap, after it, after a resume of either phase, and in a validation alone."""
    run, half = tmp_path / "run", {"precision": "bf16-true", "max_steps": 4, "logger": False}
    upcycling = {
        "harvest": {"every_n_steps": 1},
        "upcycling": {"at_step": 2, "router": RandomRouter()},
        "report": False,
    }
    phases = {"dense", "moe"}
    for resumed, expected in ((None, phases), (1, phases), (3, {"moe"})):
        callbacks, watch = [*make_callbacks(**upcycling), every_step_checkpoints(run)], Frequencies()
        path = None if resumed is None else str(run / f"checkpoints/step={resumed}.ckpt")
        trainer = make_trainer(run, [*callbacks, watch], **half)
        trainer.fit(make_module(), datamodule=make_data(), ckpt_path=path, weights_only=True)
        assert watch.seen == {(phase, torch.float32, torch.bfloat16) for phase in expected}
    module = make_module()
    make_trainer(run, [], **half).validate(module, datamodule=make_data(), ckpt_path=path, verbose=False)
    assert {buffer.dtype for buffer in module.lm.model.rotary_emb.buffers()} == {torch.float32}
    assert module.lm.dtype == torch.bfloat16


@pytest.mark.parametrize("step", [4, 9])
def test_a_resumed_model_is_set_up_as_a_fresh_one(finished, make_data, tmp_path, step):
    run, _, _ = finished
    shutil.copytree(run, tmp_path / "run")
    module = make_module(gradient_checkpointing=True)
    module.dense.gradient_checkpointing = True
    trainer = make_trainer(tmp_path / "run", make_callbacks(report=False))
    checkpoint = tmp_path / f"run/checkpoints/step={step}.ckpt"
    trainer.fit(module, datamodule=make_data(), ckpt_path=checkpoint, weights_only=True)
    assert module.phase == "moe"
    assert module.lm.is_gradient_checkpointing


@pytest.mark.parametrize("run", ["validate", "test"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_domain_without_a_held_out_batch_has_no_score(make_data, tmp_path, monkeypatch, run, elsewhere):
    """Unless another process's batch has it: all of them log the same names."""
    if elsewhere:  # as torchmetrics would gather
        monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)
        monkeypatch.setattr("torchmetrics.metric.gather_all_tensors", lambda state, group: [state, state + 1.0])
    trainer = make_trainer(tmp_path, [], logger=False, limit_val_batches=1, limit_test_batches=1)
    data = make_data(eval_batch_tokens=48)
    (metrics,) = getattr(trainer, run)(DenseModule(config=TINY), datamodule=data, verbose=False)
    domains = {name.rpartition("/")[2] for name in metrics if name.count("/") == 2}
    assert domains == ({"arithmetic", "letters"} if elsewhere else {"letters"})
    assert elsewhere or all(math.isfinite(value) for value in metrics.values())


@torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=False)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_layers_that_are_computed_again_are_compiled(kind, monkeypatch):
    calls, compile_layer = [], torch.nn.Module.compile

    def counted(graph, inputs):
        call = aot_eager(graph, inputs)
        return lambda *given: calls.append(1) or call(*given)

    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer: compile_layer(layer, backend=counted))
    torch._dynamo.reset()
    config = LlamaConfig(**TINY, vocab_size=64)
    config = moe_config(config, num_experts=4, top_k=2) if kind == "moe" else config
    torch.manual_seed(0)
    plain = build(config).train()
    fast = {"dense": DenseModule(config=TINY, **FAST), "moe": MoEModule(**FAST)}[kind]
    fast.model = copy.deepcopy(plain)
    for model in (plain, fast.lm):
        model.config._experts_implementation = "batched_mm"  # on a CPU ours is not traced
    fast.finish(SimpleNamespace(strategy=None), fast.lm)
    ids, grads = torch.randint(3, 64, (2, 9)), []
    with torch.compiler.set_stance("default"):
        for model in (plain, fast.lm):
            loss = model(ids, use_cache=False).logits.square().mean()
            if kind == "moe":
                loss = loss + last_routing(model)[0].square().mean()
            loss.backward()
            grads.append([param.grad for param in model.parameters()])
    torch.compiler.set_stance("default")
    assert len(calls) == config.num_hidden_layers
    torch.testing.assert_close(grads[1], grads[0])
