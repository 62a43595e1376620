"""Training steps through CUDA graphs against the same steps without, gradients included."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from tests.upit.model.test_attention import one_by_one
from upit.core.batches import collate, to_device
from upit.model.attention import sequence_ends
from upit.model.cuda_graphs import GraphedBody, _Graphs, check_capturable
from upit.model.families import moe_config
from upit.model.forward import body_states, response_loss
from upit.model.loading.build import build
from upit.model.routers import last_routing, moe_routers

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
FIELDS = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 96}
DENSE = LlamaConfig(**FIELDS, num_attention_heads=4, num_key_value_heads=2)
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


class HeldGraphs(_Graphs):
    """In place of the capture, without a GPU: passes whose results lie where those of the graphs would."""

    def __init__(self, function, inputs, params):
        self.function, self.params = function, params
        self.inputs = [tensor.clone() for tensor in inputs]
        self.outputs = [output.detach().clone() for output in function(*inputs)]
        self.grad_outputs = [torch.empty_like(output) for output in self.outputs]
        self.grads = [torch.empty_like(param) for param in params]
        self._forward, self._backward = SimpleNamespace(replay=self.run), SimpleNamespace(replay=self.run_backward)

    @torch.enable_grad()
    def run(self):
        self.last = self.function(*self.inputs)
        for held, output in zip(self.outputs, self.last, strict=True):
            held.copy_(output.detach())

    @torch.enable_grad()
    def run_backward(self):
        for held, grad in zip(self.grads, self._grads_of(self.last, self.grad_outputs), strict=True):
            held.copy_(grad)


@pytest.fixture(autouse=True)
def held_on_cpus(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr("upit.model.cuda_graphs._Graphs", HeldGraphs)


def batch_of(rows, seed, device, length=128, longest=60):
    torch.manual_seed(seed)
    sizes = torch.randint(3, longest, (sum(rows),)).tolist()
    dataset = [{"input_ids": torch.randint(3, 90, (n,)).tolist(), "labels": [-100] * 2 + [5] * (n - 2)} for n in sizes]
    ids = iter(range(len(dataset)))
    layout = [[next(ids) for _ in range(count)] for count in rows]
    return to_device(collate(layout, dataset, pad_id=0, length=length, longest=longest), torch.device(device))


def steps(model, batches, body):
    """Losses, routing and gradients, two batches a step."""
    seen = []
    with torch.autocast(model.device.type, torch.bfloat16):
        for number, batch in enumerate(batches):
            loss, targets_L = response_loss(model, batch, body=body)
            if model.config.model_type == "mixtral":
                logits_DTE, ids_DTK = last_routing(model)
                loss = loss + logits_DTE.float().square().mean()
                seen.append(ids_DTK.float().mean().item())
            (loss / len(targets_L)).backward()
            seen.append(loss.item())
            if number % 2:
                seen += [param.grad.float().norm().item() for param in model.parameters()]
                model.zero_grad()
    return torch.tensor(seen)


def test_a_pass_of_the_capture_leaves_no_autograd_graph_to_the_next(monkeypatch):
    """Its nodes would tie the next, on another stream, to this one's."""
    model = build(moe_config(DENSE, num_experts=4, top_k=2)).train()
    left = []

    class Watched(HeldGraphs):
        def __init__(self, function, inputs, params):
            function(*inputs)
            left.extend(router.last_logits for router in moe_routers(model))
            super().__init__(function, inputs, params)

    monkeypatch.setattr("upit.model.cuda_graphs._Graphs", Watched)
    GraphedBody()(model, batch_of([2, 2], 0, "cpu"))
    assert left == [None, None]
    assert last_routing(model)[0].shape == (2, 256, 4)


@pytest.fixture
def warnings_each_time():
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


def test_graphs_for_longer_sequences_serve_shorter_ones(monkeypatch):
    """As on a GPU, where the longest sequence is a part of what the graphs take."""
    monkeypatch.setattr("upit.model.cuda_graphs._Graphs", HeldGraphs)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", one_by_one)

    def ends(batch, *_, **__):
        return sequence_ends(batch["lengths"], batch["longest"])

    monkeypatch.setattr("upit.model.attention.packed_mask", ends)
    torch.manual_seed(0)
    model = build(DENSE).train()
    batches = [batch_of([2, 2], seed, "cpu", longest=longest) for seed, longest in enumerate([60, 45, 64, 60])]
    torch.testing.assert_close(steps(model, batches, GraphedBody()), steps(model, batches, body_states))


@pytest.mark.usefixtures("warnings_each_time")
@pytest.mark.filterwarnings("error:.*AccumulateGrad")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", [DENSE, moe_config(DENSE, num_experts=4, top_k=2)], ids=["dense", "moe"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_steps_are_those_without_graphs(device, config, compiled):
    if compiled and device == "cpu":
        pytest.skip("the capture is what compiled layers could break")
    torch.manual_seed(0)
    model = build(config).to(device).train()
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    # as captured, other lengths, fewer rows, more sequences than the graphs have room for, and shorter and longer ones
    batches = [batch_of(rows, i, device) for i, rows in enumerate([[2, 2], [1, 2], [2], [2, 1], [1, 1], [2, 2]])]
    batches.append(batch_of([2] * 80, 9, device, length=120))
    batches += [batch_of([2, 2], 10 + i, device, longest=longest) for i, longest in enumerate([60, 40, 64])]
    plain = steps(model, batches, body_states)
    graphed = steps(model, batches, GraphedBody())
    assert torch.isfinite(plain).all()
    torch.testing.assert_close(graphed, plain, rtol=2e-2, atol=2e-3)


@pytest.mark.filterwarnings("error:a batch of")
@pytest.mark.parametrize("device", DEVICES)
def test_batches_that_do_not_fit_go_the_usual_way(device, monkeypatch):
    model = build(DENSE).to(device).train()
    body, usual = GraphedBody(), []
    monkeypatch.setattr("upit.model.cuda_graphs.body_states", lambda *args: usual.append(1) or body_states(*args))
    body(model, batch_of([2, 2], 0, device))
    assert not usual
    said = r"\(1, 128\) tokens in 64 sequences, the longest of 60, .* \(2, 128\), 128 and 60"
    with pytest.warns(UserWarning, match=said):
        body(model, batch_of([2], 0, device))  # another shape
    assert len(usual) == 1
    many = batch_of([2, 2], 1, device)
    many["lengths"] = torch.nn.functional.pad(many["lengths"], (0, 64))
    body(model, many)
    assert len(usual) == 1
    many["lengths"] = torch.nn.functional.pad(many["lengths"], (0, 64))
    body(model, many)
    assert len(usual) == 2
    longer = batch_of([2, 2], 1, device) | {"longest": 61}
    body(model, longer)
    assert len(usual) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", [False, True])
def test_a_training_step_never_waits_for_the_device(graphs):
    from lightning_modules import MoEModule

    module = MoEModule(load_balancing_weight=0.01, router_z_loss_weight=0.001).cuda()
    module.model = build(moe_config(DENSE, num_experts=4, top_k=2)).cuda().train()
    module.body = GraphedBody() if graphs else body_states

    def step(batch):
        with torch.autocast("cuda", torch.bfloat16):
            loss, terms, tokens = module.objective(batch)
            module.means.update(torch.stack(list(terms.values())) * tokens, tokens.expand(len(terms)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    step(batch_of([2, 2], 0, "cuda"))
    later = batch_of([2, 1], 1, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(later)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gradients_are_copied_only_where_they_add_up(monkeypatch):
    model, body = build(DENSE).train(), GraphedBody()
    copies, clone = [], torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda self: copies.append(1) or clone(self))
    for number, zeroed in enumerate([True, True, False]):
        loss, _ = response_loss(model, batch_of([2, 2], number, "cpu"), body=body)
        if zeroed:  # where Lightning does it
            model.zero_grad()
        copies.clear()
        loss.backward()
        assert len(copies) == (0 if zeroed else len(list(model.model.parameters())))


def test_what_cannot_be_captured_says_how_to_go_on(monkeypatch):
    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("upit.model.cuda_graphs._Graphs", refuse)
    with pytest.raises(RuntimeError, match="a llama can't be captured as CUDA graphs; set cuda_graphs=false"):
        GraphedBody()(build(DENSE).train(), batch_of([2, 2], 0, "cpu"))


def test_experts_that_ask_the_host_are_refused_before_the_run(monkeypatch):
    with pytest.raises(ValueError, match="precision=bf16-mixed, not '32-true'"):
        check_capturable("32-true")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ValueError, match="needs a Hopper GPU or a newer one, not a NVIDIA A100"):
        check_capturable("bf16-mixed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    check_capturable("bf16-mixed")
