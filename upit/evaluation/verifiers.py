"""Verifiers: whether a generated answer is right. One is chosen for each domain, by ``class_path``."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d)\.?)(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?")
_FENCE = re.compile(r"```(?:[\w+-]*)\n(.*?)```", re.DOTALL)
_LIMITED = """
import resource, sys
seconds, size = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (size, size))
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
exec(compile(sys.stdin.read(), "answer.py", "exec"), {"__name__": "__main__"})
"""


class Verifier(ABC):
    """Judges the answers to a domain's held-out examples. Subclass it for a task of your own."""

    @abstractmethod
    def __call__(self, example: Mapping[str, Any], completion: str) -> bool:
        """Whether a completion answers an example.

        Args:
            example: see :class:`upit.core.batches.Example`; ``answer`` is the reference, ``metadata`` what the data
                has for the verifier.
            completion: the generated text.
        """


class Exact(Verifier):
    """The reference answer, white space aside.

    Args:
        ignore_case: capital letters do not matter.
    """

    def __init__(self, ignore_case: bool = False) -> None:
        self.ignore_case = ignore_case

    def __call__(self, example: Mapping[str, Any], completion: str) -> bool:
        return self._words(completion) == self._words(example["answer"])

    def _words(self, text: str) -> list[str]:
        return (text.casefold() if self.ignore_case else text).split()


class OneOf(Exact):
    """One of several right answers: a JSON list in the example's metadata, else parts of the reference.

    Args:
        separator: between the answers in the reference.
        ignore_case: capital letters do not matter.
    """

    def __init__(self, separator: str = "|", ignore_case: bool = False) -> None:
        super().__init__(ignore_case)
        if not separator:
            raise ValueError("OneOf.separator='' must be a text")
        self.separator = separator

    def __call__(self, example: Mapping[str, Any], completion: str) -> bool:
        answers = json.loads(example["metadata"]) if example["metadata"] else example["answer"].split(self.separator)
        return any(self._words(completion) == self._words(str(answer)) for answer in answers)


class MultipleChoice(Verifier):
    """The letter of the right choice.

    It is the letter after "answer is" or in ``\\boxed{}`` if there is one, else the first one that stands alone.

    Args:
        letters: of the choices.
    """

    def __init__(self, letters: str = "ABCDE") -> None:
        if not letters.isalnum():
            raise ValueError(f"MultipleChoice.letters={letters!r} must be letters or digits")
        one = f"[{letters}]"
        self.patterns = (
            re.compile(rf"(?i:answer\s*(?:is|:)|\\boxed)\W*({one})\b"),
            re.compile(rf"(?<![\w'])({one})(?![\w'])"),
        )

    def __call__(self, example: Mapping[str, Any], completion: str) -> bool:
        expected = self._letter(example["answer"])
        return expected is not None and self._letter(completion) == expected

    def _letter(self, text: str) -> str | None:
        found = (pattern.search(text) for pattern in self.patterns)
        return next((match.group(1) for match in found if match), None)


class Number(Verifier):
    """The last number of the answer, as in GSM8K; thousands' commas, decimals and fractions are read.

    Args:
        tolerance: largest difference that counts as right, relative to the reference.
    """

    def __init__(self, tolerance: float = 0.0) -> None:
        if tolerance < 0:
            raise ValueError(f"Number.tolerance={tolerance} must not be negative")
        self.tolerance = Fraction(str(tolerance))

    def __call__(self, example: Mapping[str, Any], completion: str) -> bool:
        expected, found = _last_number(example["answer"]), _last_number(completion)
        if expected is None or found is None:
            return False
        return abs(found - expected) <= self.tolerance * abs(expected)


def _last_number(text: str) -> Fraction | None:
    for match in reversed([m.group() for m in _NUMBER.finditer(text) if any(c.isdigit() for c in m.group())]):
        over, _, under = match.replace(",", "").replace(" ", "").partition("/")
        try:
            number = Decimal(over)
            if abs(number.adjusted()) < 400:  # a larger exponent would take long to write out
                return Fraction(number) / int(under or 1)
        except (InvalidOperation, ZeroDivisionError):
            continue
    return None


class Code(Verifier):
    """Run the answer as Python: right if the tests in the example's metadata pass, or if it prints the reference.

    The code is that of the answer's last fenced block, else the whole answer. It runs in a process of its own with
    limits on time, memory and file size. That is no security boundary: the code can read files and reach the network.
    Use it in a container only.

    Args:
        enabled: run generated code; must be set.
        seconds: of the run.
        memory_mb: of the process.
    """

    def __init__(self, enabled: bool = False, seconds: int = 5, memory_mb: int = 512) -> None:
        if not enabled:
            raise ValueError(
                "upit.evaluation.verifiers.Code runs generated code, and its limits are no security boundary; "
                "set enabled: true if the run is in a container"
            )
        if seconds < 1 or memory_mb < 1:
            raise ValueError(f"Code.seconds={seconds} and Code.memory_mb={memory_mb} must be at least 1")
        self.seconds, self.memory_mb = seconds, memory_mb

    def __call__(self, example: Mapping[str, Any], completion: str) -> bool:
        code = (_FENCE.findall(completion) or [completion])[-1]
        printed = self._run(f"{code}\n{example['metadata']}")
        if printed is None:
            return False
        return bool(example["metadata"]) or printed.split() == example["answer"].split()

    def _run(self, program: str) -> str | None:
        """What a program prints; None where it fails."""
        limits = [str(self.seconds), str(self.memory_mb * 2**20)]
        with tempfile.TemporaryDirectory() as folder:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", _LIMITED, *limits],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                cwd=folder, env={"PATH": os.defpath}, start_new_session=True,
            )  # fmt: skip
            with process:
                try:
                    printed, _ = process.communicate(program.encode(errors="replace"), timeout=self.seconds + 1)
                except subprocess.TimeoutExpired:
                    return None
                finally:  # with the processes that it started
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
        return printed.decode(errors="replace") if process.returncode == 0 else None
