"""Change one small thing in the code at a time, and see whether the tests that mirror it fail.

    python -m tests.mutations --count 40 --seed 0 lightning_modules/accumulation.py upit/core/finite.py

Works on a copy of the repository. Prints a line a mutation and ends with the survivors: changes that no test noticed.
A survivor is a missing test, or a change that means the same.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from tqdm.auto import tqdm

ROOT = Path(__file__).parents[1]
IGNORED = shutil.ignore_patterns(".*", "runs", "__pycache__", "*.egg-info", "build", "dist")
MIRRORS = {  # modules whose tests have another name, or lie in several files
    "upit/preparation/expert.py": ["upit/preparation/test_pool.py"],
    "upit/router_init/seeds.py": ["upit/router_init/test_seeds.py", "upit/router_init/test_assignment.py"],
    "upit/report/lineage.py": ["upit/upcycling/test_export.py", "upit/report/test_figures.py"],
    "upit/report/model_card.py": ["upit/upcycling/test_export.py"],
    "upit/offline/export_checkpoint.py": ["upit/upcycling/test_export.py"],
    "upit/cli/moved.py": ["upit/cli/test_errors.py"],
    **{
        f"upit/model/families/{name}.py": ["upit/model/test_families.py"] for name in ("base", "llama", "olmo", "qwen")
    },
    **{
        f"upit/report/figures/{name}.py": ["upit/report/test_figures.py"]
        for name in ("base", "curves", "lineage", "pilot", "routing", "seeds", "similarity")
    },
    **{
        f"callbacks/pictures/{name}.py": ["callbacks/test_pictures.py"]
        for name in ("base", "pilot", "routing", "swap")
    },
    **{
        f"upit/offline/{name}.py": ["upit/offline/test_stages.py"]
        for name in ("expand_files", "upcycle_files", "init_router", "inspect", "standalone", "inputs", "terminal")
    },
    **{f"upit/cli/{name}.py": ["test_cli.py"] for name in ("main", "fit", "parser", "own_modules")},
    "upit/cli/stages.py": ["upit/offline/test_stages.py", "test_cli.py"],
    "lightning_modules/base.py": ["lightning_modules/test_modules.py", "lightning_modules/test_accumulation.py"],
    "lightning_modules/horizon.py": ["lightning_modules/test_schedules.py"],
}
OPPOSITES: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip


class Mutation(NamedTuple):
    """One change: the file, the line, what it was and what it is, and the whole new source."""

    file: str
    line: int
    before: str
    after: str
    source: str


def mutations(file: str) -> Iterator[Mutation]:
    """Every small change to the bodies of a file's functions."""
    tree = ast.parse((ROOT / file).read_text())
    for node in list(_changeable(tree)):
        before = ast.unparse(node)
        for changed in _changes(node):
            fields = copy.copy(node.__dict__), node.__class__
            node.__class__, node.__dict__ = changed.__class__, {**node.__dict__, **changed.__dict__}
            yield Mutation(file, node.lineno, before, ast.unparse(node), ast.unparse(ast.fix_missing_locations(tree)))
            node.__dict__, node.__class__ = fields


def _changeable(tree: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """Expressions and statements in functions, but those of messages, annotations and docstrings."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for statement in function.body:
                yield from _inside(statement)


def _inside(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    if isinstance(node, ast.JoinedStr | ast.Raise | ast.FunctionDef | ast.Import | ast.ImportFrom | ast.Assert):
        return
    if isinstance(node, ast.expr | ast.stmt):
        yield node
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _inside(child)


def _changes(node: ast.expr | ast.stmt) -> Iterator[ast.AST]:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPPOSITES:
        yield ast.Compare(node.left, [OPPOSITES[type(node.ops[0])](), *node.ops[1:]], node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in OPPOSITES:
        yield ast.BinOp(node.left, OPPOSITES[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(OPPOSITES[type(node.op)](), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield ast.Call(ast.Name("bool", ast.Load()), [node.operand], [])
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        yield ast.Return(ast.Constant(None))
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Expr(ast.Constant(None))


def tests_of(file: str) -> list[str]:
    """The test files that mirror a module."""
    package, name = Path(file).parent, Path(file).name
    found = [f"tests/{path}" for path in MIRRORS.get(file, [f"{package}/test_{name}"])]
    missing = [path for path in found if not (ROOT / path).exists()]
    if missing:
        raise SystemExit(f"{file}: {missing[0]} does not exist; add the module to MIRRORS in tests/mutations.py")
    return found


def survives(mutation: Mutation, checkout: Path) -> bool:
    """Whether the mirrored tests pass with the change."""
    file = checkout / mutation.file
    original = file.read_text()
    file.write_text(mutation.source)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests_of(mutation.file)]
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, timeout=300, check=False)
        return done.returncode == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        file.write_text(original)


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.mutations", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="modules to change, such as upit/core/finite.py")
    parser.add_argument("--count", type=int, default=40, help="changes to try, drawn from all; default 40")
    parser.add_argument("--seed", type=int, default=0, help="of the draw; default 0")
    parser.add_argument("--jobs", type=int, default=2, help="changes at a time; default 2")
    options = parser.parse_args()
    found = [mutation for file in options.files for mutation in mutations(file)]
    drawn = random.Random(options.seed).sample(found, min(options.count, len(found)))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        checkouts: SimpleQueue[Path] = SimpleQueue()
        for job in range(options.jobs):
            checkouts.put(Path(shutil.copytree(ROOT, Path(folder) / str(job), ignore=IGNORED)))

        def work(mutation: Mutation) -> bool:
            checkout = checkouts.get()
            try:
                return survives(mutation, checkout)
            finally:
                checkouts.put(checkout)

        outcomes = list(tqdm(pool.map(work, drawn), total=len(drawn), desc="Mutations"))
    for mutation, survived in zip(drawn, outcomes, strict=True):
        state = "SURVIVED" if survived else "caught"
        print(f"{state:8} {mutation.file}:{mutation.line}: {mutation.before!r:.90} -> {mutation.after!r:.90}")
    print(f"{len(drawn) - sum(outcomes)} of {len(drawn)} caught, of {len(found)} possible; seed {options.seed}")
    sys.exit(any(outcomes))


if __name__ == "__main__":
    main()
