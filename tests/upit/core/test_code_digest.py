"""What counts as another class: its module, its name, the code of its module and of its bases; layout does not."""

import importlib
import sys
import types

import pytest

from upit.core.code_digest import code_of
from upit.expansion.expand import expand
from upit.expansion.merging import Dare, Linear, Merge

SOURCE = '''
"""A merge of the user's."""

from upit.expansion.merging import Merge

SHARE = 0.5
TABLE = frozenset({1})  # no plain value


def helper(a, b):
    """Between the two."""
    return SHARE * a + (1 - SHARE) * b


class Own(Merge):
    """Half of each."""

    def __call__(self, tensors, weights, base, generators):
        return helper(tensors[0], tensors[1])  # of one dtype
'''
CHILD = "from {base} import Own\n\n\nclass Heir(Own):\n    pass\n"


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """Imports a module of this name and source anew, as another process would."""
    monkeypatch.syspath_prepend(tmp_path)
    names = set()

    def fresh(name: str, source: str):
        (tmp_path / f"{name}.py").write_text(source)
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        names.add(name)
        return importlib.import_module(name)

    yield fresh
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("old", "new"),
    [("0.5", "0.25"), ("tensors[0], tensors[1]", "tensors[1], tensors[0]"), ("(1 - SHARE)", "SHARE"), ("{1}", "{2}")],
    ids=["constant", "method", "helper", "object"],
)
def test_another_code_is_another_class(imported, old, new):
    before = code_of(imported("own_merge", SOURCE).Own)
    assert code_of(imported("own_merge", SOURCE.replace(old, new)).Own) != before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# of one dtype", "# a comment"),
        ("Half of each.", "Other words."),
        ('    """Between the two."""\n', ""),
        ('"""A merge of the user\'s."""', '"""Words."""\n\n\n'),
    ],
    ids=["comment", "docstring", "no docstring", "layout"],
)
def test_words_and_layout_do_not_count(imported, old, new):
    assert old in SOURCE
    before = code_of(imported("own_merge", SOURCE).Own)
    assert code_of(imported("own_merge", SOURCE.replace(old, new)).Own) == before


def test_the_same_source_in_another_module_is_another_class(imported):
    assert code_of(imported("one_merge", SOURCE).Own) != code_of(imported("other_merge", SOURCE).Own)


def test_bases_count(imported):
    imported("base_merge", SOURCE)
    before = code_of(imported("heir_merge", CHILD.format(base="base_merge")).Heir)
    imported("base_merge", SOURCE.replace("0.5", "0.25"))
    assert code_of(imported("heir_merge", CHILD.format(base="base_merge")).Heir) != before
    assert [name for _, name, _ in before] == ["Heir", "Own", "Merge", "Strategy"]


def in_a_notebook(source: str) -> type:
    """The class that a module without a file defines."""
    module = types.ModuleType("__main__")
    exec(source, module.__dict__)
    return module.Own


@pytest.mark.parametrize(
    ("old", "new"),
    [("0.5", "0.25"), ("(1 - SHARE)", "SHARE"), ("tensors[1]", "base")],
    ids=["constant", "helper", "method"],
)
def test_a_class_without_a_file_is_known_by_its_code(old, new):
    before = code_of(in_a_notebook(SOURCE))
    assert code_of(in_a_notebook(SOURCE)) == before
    assert code_of(in_a_notebook(SOURCE.replace("Half of each.", "Words.").replace("Between", "Amid"))) == before
    assert code_of(in_a_notebook(SOURCE.replace(old, new))) != before


def test_a_class_made_by_type_counts_though_it_says_that_it_is_of_the_standard_library():
    one = type("Own", (Merge,), {"__call__": lambda self, tensors, *_: tensors[0]})
    other = type("Own", (Merge,), {"__call__": lambda self, tensors, *_: tensors[1]})
    assert one.__module__ == "abc"
    assert code_of(one) != code_of(other)


def test_a_class_without_a_file_whose_code_cannot_be_seen_is_never_reused_and_said():
    with pytest.warns(UserWarning, match=r"the code of its __call__ is not available.* never reused"):
        first = code_of(type("Own", (Merge,), {"__call__": max}))
    with pytest.warns(UserWarning, match="never reused"):
        assert code_of(type("Own", (Merge,), {"__call__": max})) != first


def test_a_class_without_code_of_its_own_is_known_by_its_bases(recwarn):
    assert code_of(type("Own", (Linear,), {})) == code_of(type("Own", (Linear,), {}))
    assert code_of(type("Own", (Linear,), {"share": 1})) != code_of(type("Own", (Linear,), {"share": 2}))
    assert not recwarn


def test_what_depends_on_a_function_around_it_is_never_reused_and_said(pool_of_two, tmp_path):
    def with_share(share: float) -> type[Merge]:
        class Own(Merge):
            def __call__(self, tensors, weights, base, generators):
                return share * tensors[0] + (1 - share) * tensors[1]

        return Own

    with pytest.warns(UserWarning, match=r"Own: its code depends on \['share'\].* never reused"):
        assert code_of(with_share(0.5)) != code_of(with_share(0.5))


@pytest.fixture
def pool_of_two(dense, make_pool):
    return make_pool(dense, 2)


def children(pool, output, merge):
    found = expand(pool.experts, pool.base, num_experts=3, output=output, merge=merge).experts[2:]
    return [child.read(name) for child in found for name in child.shapes]


def test_a_merge_that_was_edited_is_not_taken_from_the_file_of_the_old_one(pool_of_two, tmp_path, imported):
    old = children(pool_of_two, tmp_path, imported("own_merge", SOURCE).Own())
    new = children(pool_of_two, tmp_path, imported("own_merge", SOURCE.replace("0.5", "0.25")).Own())
    halves = pool_of_two.experts
    for name, before, after in zip(halves[0].shapes, old, new, strict=True):
        a, b = (expert.read(name) for expert in halves)
        assert before.equal(0.5 * a + 0.5 * b)
        assert after.equal(0.25 * a + 0.75 * b)


def test_the_lineage_stays_short():
    assert Dare(0.3).describe() == {"name": "Dare", "drop_rate": 0.3}
    assert Linear().describe() == {"name": "Linear"}
