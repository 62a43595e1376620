"""The names of ops."""

from upit.ops import op_name


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
