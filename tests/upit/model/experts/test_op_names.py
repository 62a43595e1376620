"""The names of ops."""

import ast
from pathlib import Path

import upit
from upit.model.experts.op_names import op_name


def test_an_op_whose_code_changes_is_another_op(tmp_path):
    """Else torch.compile would take the earlier one from its cache on disk (found so on 26 November 2026)."""
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    first.write_text("FACTOR = 2")
    second.write_text("")
    name = op_name("experts", str(first), str(second))
    assert name.startswith("upit::experts_")
    assert op_name("experts", str(first), str(second)) == name
    second.write_text("FACTOR = 3")
    assert op_name("experts", str(first), str(second)) != name


def test_every_op_that_the_compiler_sees_through_is_named_so():
    names = [
        (file.name, ast.unparse(decorator.args[0]))
        for file in sorted(Path(upit.__file__).parent.rglob("*.py"))
        for function in ast.walk(ast.parse(file.read_text()))
        if isinstance(function, ast.FunctionDef)
        for decorator in function.decorator_list
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "triton_op"
    ]
    assert {file for file, _ in names} == {"quack_kernels.py", "triton_kernels.py"}
    assert all(name.startswith("op_name(") for _, name in names)
