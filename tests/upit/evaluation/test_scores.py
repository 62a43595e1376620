"""Held-out evaluation: greedy answers that depend on no batch, scores per domain, drift."""

import math

import pytest
import torch

from tests.conftest import TINY
from upit.evaluation.scores import (
    answer_budget,
    domain_exact_match,
    drift,
    evaluate,
    greedy_answers,
    reference_logits,
    summed_answers,
)
from upit.evaluation.verifiers import Verifier
from upit.model.loading.build import build, scratch_config


@pytest.fixture
def model(data):
    torch.manual_seed(3)
    return build(scratch_config({**TINY, "initializer_range": 0.3}, data.tokenizer)).eval()


def prompts_of(data, count):
    return [row["input_ids"][: row["prompt_length"]] for row in data.heldout_set[:count]]


def greedy_alone(model, tokenizer, prompt, length):
    """Without cache, padding or generate."""
    ids = list(prompt)
    for _ in range(length):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


@torch.no_grad()
def test_batched_cached_answers_are_those_of_a_plain_loop(model, data):
    prompts = prompts_of(data, 4)
    budgets = [3, 12, 7, 9]
    answers = greedy_answers(model, data.tokenizer, prompts, max_new_tokens=budgets)
    for prompt, budget, answer in zip(prompts, budgets, answers, strict=True):
        assert answer == greedy_alone(model, data.tokenizer, prompt, budget)


def test_an_answer_stops_at_the_end_of_the_turn(model, data):
    with torch.no_grad():
        model.get_output_embeddings().weight[data.tokenizer.eos_token_id] = 0
        model.model.norm.weight.zero_()  # all logits equal 0: greedy takes the first id
        model.get_output_embeddings().weight.zero_()
    (answer,) = greedy_answers(model, data.tokenizer, prompts_of(data, 1), max_new_tokens=[5])
    assert answer == "", "special tokens are no part of an answer"


def test_the_budget_grows_with_the_reference():
    example = {"input_ids": list(range(30)), "prompt_length": 10}
    assert answer_budget(example) == 46


@pytest.mark.parametrize("max_tokens", [64, 8192])
def test_scores_per_domain(model, data, monkeypatch, max_tokens):
    """The verifier decides; the loss is the mean over a domain's response tokens, whatever the batches."""
    monkeypatch.setattr(data, "verify", lambda row, _: row["domain"] == "letters")
    monkeypatch.setattr(data, "eval_batch_tokens", max_tokens)
    scores = evaluate(model, data)
    assert scores["domains"]["letters"]["exact_match"] == 1.0
    assert scores["domains"]["arithmetic"]["exact_match"] == 0.0
    assert scores["average"]["exact_match"] == 0.5
    for domain in ("letters", "arithmetic"):
        total, tokens = 0.0, 0
        for row in data.heldout_set:
            if row["domain"] == domain:
                ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
                with torch.no_grad():
                    logits = model(ids).logits[0, :-1]
                total += float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))
                tokens += int((labels[1:] != -100).sum())
        assert scores["domains"][domain]["loss"] == pytest.approx(total / tokens, rel=1e-4)
    losses = [own["loss"] for own in scores["domains"].values()]
    assert scores["average"]["loss"] == pytest.approx(sum(losses) / 2), "the average weighs domains alike"


def test_evaluation_hands_the_answers_to_the_verifier_and_restores_the_mode(model, data, monkeypatch):
    seen = {}
    monkeypatch.setattr(data, "verify", lambda row, answer: seen.setdefault(row["id"], answer) == "")
    model.train()
    evaluate(model, data)
    assert model.training
    assert len(seen) == len(data.heldout_set)
    model.eval()
    row = data.heldout_set[0]
    alone = greedy_alone(model, data.tokenizer, row["input_ids"][: row["prompt_length"]], answer_budget(row))
    assert seen[row["id"]] == alone


def test_exact_match_is_the_share_of_a_domains_questions(model, data, monkeypatch):
    own = [row["id"] for row in data.heldout_set if row["domain"] == "letters"]
    monkeypatch.setattr(data, "verify", lambda row, _: row["id"] in own[:3])
    right = domain_exact_match(model, data, max_new_tokens=1)
    assert right == {"arithmetic": 0.0, "letters": pytest.approx(3 / len(own))}


def test_a_domain_s_verifier_decides_and_scoring_can_be_capped_or_turned_off(model, make_data):
    def module(**kwargs):
        made = make_data(**kwargs)
        made.prepare_data()
        made.setup("fit")
        return made

    class Always(Verifier):
        def __call__(self, example, completion):
            return True

    data = module(verifiers={"letters": Always(), "arithmetic": None}, score_examples=3)
    assert [data.heldout_set[i]["domain"] for i in data.scored_examples()] == ["letters"] * 3
    scores = evaluate(model, data, max_new_tokens=1)
    assert scores["domains"]["letters"]["exact_match"] == scores["average"]["exact_match"] == 1.0
    assert math.isnan(scores["domains"]["arithmetic"]["exact_match"])
    assert scores["domains"]["arithmetic"]["loss"] > 0
    off = module(score_examples=0)
    assert math.isnan(evaluate(model, off)["average"]["exact_match"])
    with pytest.raises(ValueError, match=r"data\.verifiers names \['music'\], .* \['arithmetic', 'letters'\]"):
        module(verifiers={"music": None})


def test_padding_is_answered_but_not_counted(model, data, monkeypatch):
    monkeypatch.setattr(data, "verify", lambda row, _: True)
    right_C, asked_C = summed_answers(model, [0, -1], data, max_new_tokens=1)
    assert right_C.sum() == asked_C.sum() == 1


def test_drift_is_zero_without_a_change_and_the_mean_kl_with_one(model, data):
    before = reference_logits(model, data, 6)
    assert drift(model, before, data, 6) == 0.0
    with torch.no_grad():
        model.model.norm.weight.mul_(0.5)
    after = reference_logits(model, data, 6)
    p = torch.cat(before).double().log_softmax(-1)
    q = torch.cat(after).double().log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert drift(model, before, data, 6) == pytest.approx(expected, rel=1e-4)
