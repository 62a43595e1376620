"""Perplexity of every expert on every seed example, who gets which, and what is reused."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from tests.upit.conftest import make_data, shift
from upit.core.batches import IGNORE, collate
from upit.core.finite import NotFiniteError
from upit.model.forward import response_logits
from upit.preparation.expert import Expert
from upit.preparation.placement import load_experts
from upit.preparation.pool import Pool
from upit.router_init import scoring
from upit.router_init.scoring import SeedBatches, SeedScorer, score_examples
from upit.router_init.seeds import LowestPerplexity

DATA = make_data(12)
SEEDS = [1, 4, 6, 7, 10, 11]


@pytest.fixture
def pool(dense, make_pool) -> Pool:
    return make_pool(dense, 3)


@pytest.fixture
def experts(pool) -> list[Expert]:
    return pool.experts


@pytest.fixture
def file(tmp_path):
    return tmp_path / "upcycling/seed_perplexity.json"


@pytest.fixture
def passes(monkeypatch):
    """Counts scoring passes."""
    seen = []
    original = scoring.score_examples
    monkeypatch.setattr(scoring, "score_examples", lambda *a, **k: seen.append(1) or original(*a, **k))
    return seen


def run(dense, experts, file, *, indices=SEEDS, data=DATA):
    return SeedScorer(dense, indices, data, file=file).assign(experts, LowestPerplexity())


def loss_alone(model, index: int) -> tuple[float, int]:
    logits, targets, _ = response_logits(model, collate([[index]], DATA.train_set, pad_id=0))
    return float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum")), len(targets)


@torch.no_grad()
@pytest.mark.parametrize("max_tokens", [1, 30, 8192])
def test_scores_are_those_of_each_example_alone(dense, max_tokens, monkeypatch):
    monkeypatch.setattr("upit.router_init.scoring.BATCH_TOKENS", max_tokens)
    loss_S, tokens_S = score_examples(dense, SeedBatches(SEEDS, DATA.train_set, pad_id=0, device=torch.device("cpu")))
    for row, index in enumerate(SEEDS):
        loss, tokens = loss_alone(dense, index)
        assert float(loss_S[row]) == pytest.approx(loss, rel=1e-4)
        assert int(tokens_S[row]) == tokens == sum(label != IGNORE for label in DATA.train_set[index]["labels"])


@torch.no_grad()
def test_each_column_is_the_perplexity_under_its_expert(dense, experts, file):
    seeds = run(dense, experts, file)
    for e, _ in enumerate(load_experts(dense, experts)):
        for row, index in enumerate(SEEDS):
            loss, tokens = loss_alone(dense, index)
            assert float(seeds.perplexity_SN[row, e]) == pytest.approx(math.exp(loss / tokens), rel=1e-4)


@torch.no_grad()
def test_experts_stand_in_the_model_one_after_the_other(dense, experts):
    for expert, loaded in zip(experts, load_experts(dense, experts), strict=True):
        assert loaded is expert
        params = {name: param for name, param in dense.named_parameters() if name in expert.shapes}
        assert params.keys() == expert.shapes.keys()
        assert all(torch.equal(param, expert.read(name)) for name, param in params.items())


def test_buckets_hold_every_seed_example_once(dense, experts, file):
    seeds = run(dense, experts, file)
    buckets = [seeds.bucket(e) for e in range(3)]
    assert sorted(index for bucket in buckets for index in bucket) == SEEDS
    assert [len(bucket) for bucket in buckets] == seeds.counts == [2, 2, 2]


def test_the_file_says_what_others_read(dense, experts, file):
    seeds = run(dense, experts, file)
    content = json.loads(file.read_text())
    assert content["counts"] == seeds.counts
    for row, (index, example) in enumerate(zip(SEEDS, content["examples"], strict=True)):
        assert example["id"] == DATA.train_set[index]["id"]
        assert example["domain"] == DATA.train_set[index]["domain"]
        assert example["perplexity"] == seeds.perplexity_SN[row].tolist()
        assert example["expert"] == int(seeds.expert_S[row])


def test_finished_experts_are_not_scored_again(dense, experts, file, passes):
    run(dense, experts[:2], file)
    assert len(passes) == 2
    again = run(dense, experts, file)
    assert len(passes) == 3
    fresh = run(dense, experts, file.with_name("fresh.json"))
    assert torch.equal(again.perplexity_SN, fresh.perplexity_SN)


def test_a_crash_keeps_the_experts_scored_before_it(dense, experts, file, passes, monkeypatch):
    original = scoring.score_examples

    def crash(*args, **kwargs):
        if len(passes) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score_examples", crash)
        with pytest.raises(KeyboardInterrupt):
            run(dense, experts, file)
    run(dense, experts, file)
    assert len(passes) == 3


@pytest.mark.parametrize("change", ["seeds", "dense", "expert", "tokens", "labels"])
def test_scores_of_anything_else_are_made_anew(dense, pool, experts, file, passes, change):
    run(dense, experts, file)
    passes.clear()
    indices, data = SEEDS, DATA
    if change == "seeds":
        indices = SEEDS[:-1]
    elif change in ("tokens", "labels"):  # under the same ids
        column = "input_ids" if change == "tokens" else "labels"
        examples = [{**example, column: [*example[column]]} for example in DATA.train_set]
        examples[SEEDS[2]][column][-1] = 5
        data = SimpleNamespace(train_set=examples, tokenizer=DATA.tokenizer)
    elif change == "dense":  # the final norm stands still, as it does in bf16-true or when frozen
        with torch.no_grad():
            dense.model.layers[1].self_attn.q_proj.weight[0, 0] += 1e-3
    else:
        base = {name: pool.base.read(name) for name in pool.base.shapes}
        pool.add(shift(base, 0.4, seed=50), step=10, epoch=0.25, metrics={})
        experts = pool.experts
    found = run(dense, experts, file, indices=indices, data=data)
    assert len(passes) == (1 if change == "expert" else 3)
    fresh = run(dense, experts, file.with_name("fresh.json"), indices=indices, data=data)
    assert torch.equal(found.perplexity_SN, fresh.perplexity_SN)


def one_digit(file):
    content = json.loads(file.read_text())
    next(iter(content["columns"].values()))[0] *= 1.5
    file.write_text(json.dumps(content))


def another_version(file):
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 0}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (one_digit, "is damaged: its sha256"),
        (lambda file: file.write_text(file.read_text()[:-30]), "can.t be read as JSON"),
        (another_version, "has format version 0"),
    ],
    ids=["one digit", "truncated", "version"],
)
def test_a_damaged_file_of_scores_is_not_used(dense, experts, file, passes, damage, message):
    before = run(dense, experts, file)
    damage(file)
    with pytest.warns(UserWarning, match=rf"seed_perplexity\.json' {message}.*scored again"):
        again = run(dense, experts, file)
    assert len(passes) == 6
    assert torch.equal(again.perplexity_SN, before.perplexity_SN)


def test_the_same_expert_twice_is_scored_once(dense, experts, file, passes):
    seeds = run(dense, [experts[0], experts[1], experts[0]], file)
    assert len(passes) == 2
    assert torch.equal(seeds.perplexity_SN[:, 0], seeds.perplexity_SN[:, 2])


def test_an_expert_whose_loss_is_nan_is_named_and_its_scores_are_not_kept(dense, experts, file, monkeypatch):
    """In half precision, say, where finite weights overflow."""
    original = scoring.score_examples
    monkeypatch.setattr(scoring, "score_examples", lambda *a, **k: (math.nan * original(*a, **k)[0], original(*a)[1]))
    with pytest.raises(NotFiniteError, match=r"step_\d+\.safetensors': this expert's loss on a seed example is NaN"):
        run(dense, experts, file)
    assert not file.exists()


def test_the_perplexity_of_a_hopeless_expert_is_still_a_number(dense, experts, file, monkeypatch):
    original = scoring.score_examples
    monkeypatch.setattr(scoring, "score_examples", lambda *a, **k: (1e5 * original(*a, **k)[0], original(*a, **k)[1]))
    assert run(dense, experts, file).perplexity_SN.isfinite().all()
