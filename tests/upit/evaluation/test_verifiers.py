"""Verifiers: what counts as right."""

import json
import time

import pytest

from upit.evaluation.verifiers import Code, Exact, MultipleChoice, Number, OneOf


def example(answer: str, metadata: str = "") -> dict:
    return {"answer": answer, "metadata": metadata}


@pytest.mark.parametrize(
    ("verifier", "answer", "right", "wrong"),
    [
        (Exact(), "4 2", [" 4  2\n"], ["42", "", "4 2 0"]),
        (Exact(ignore_case=True), "Paris", ["paris"], ["Pariss"]),
        (OneOf(), "Paris|the city of light", ["Paris", " the city  of light"], ["Paris|the city of light", "", "the"]),
        (OneOf(separator=" or "), "a or b", ["a", "b"], ["a or b"]),
        (
            MultipleChoice(),
            "B",
            ["B", "(B)", "b) no: B.", "The answer is (B), not A.", r"\boxed{B}", "B. A dog"],
            ["A", "", "Because", "The answer is A, not B", "ABBA", "B's not, A is: answer: A"],
        ),
        (MultipleChoice("12"), "(2) dog", ["2"], ["1", "12"]),
        (
            Number(),
            "So 1,000 + 0.5 = #### 1,000.5",
            ["1000.5", "it is 1000.50.", "3 + 4 = 1,000.5", "2001/2"],
            ["1000", "1,000.5 or 7", "", "none", "1/0"],
        ),
        (Number(), "-3", ["x = -3", "-3.0"], ["3"]),
        (Number(tolerance=0.01), "100", ["100.9", "99"], ["101.1"]),
        (Number(), "5", ["5", "5."], ["1e999999999", "5e999999999"]),
    ],
)
def test_what_is_right(verifier, answer, right, wrong):
    assert [text for text in right if not verifier(example(answer), text)] == []
    assert [text for text in wrong if verifier(example(answer), text)] == []


def test_several_answers_in_the_metadata():
    assert OneOf()(example("42", json.dumps(["42", "forty-two"])), "forty-two")
    assert not OneOf()(example("42|43", json.dumps(["42"])), "43")


def test_generated_code_is_not_run_unless_asked():
    with pytest.raises(ValueError, match="no security boundary; set enabled: true"):
        Code()


def test_code_is_right_by_its_tests_or_by_what_it_prints():
    verifier = Code(enabled=True, seconds=2)
    tests = "assert add(1, 2) == 3"
    assert verifier(example("", tests), "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.")
    assert not verifier(example("", tests), "def add(a, b):\n    return a - b")
    assert verifier(example("3"), "print(1 + 2)")
    assert not verifier(example("3"), "print(4)")
    assert not verifier(example("3"), "no code")


@pytest.mark.parametrize("code", ["while True: pass", "x = [0] * 10**9", "open('a', 'w').write('a' * 10**8)"])
def test_code_is_kept_within_limits(code):
    start = time.perf_counter()
    assert not Code(enabled=True, seconds=1, memory_mb=256)(example("done"), f"{code}\nprint('done')")
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OneOf(separator=""), "separator"),
        (lambda: MultipleChoice(letters=""), "letters"),
        (lambda: Number(tolerance=-1), "tolerance=-1"),
        (lambda: Code(enabled=True, seconds=0), "seconds=0"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
