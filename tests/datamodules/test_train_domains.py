"""Training on some domains only."""

import pytest


def prepared(make_data, **kwargs):
    data = make_data(**kwargs)
    data.prepare_data()
    data.setup("fit")
    return data


def test_only_these_domains_are_trained_on(make_data):
    whole, part = prepared(make_data), prepared(make_data, train_domains=["letters"])
    assert {row["domain"] for row in part.train_set} == {"letters"}
    assert part.train_set == [row for row in whole.train_set if row["domain"] == "letters"]
    assert part.heldout_set == whole.heldout_set
    assert part.folder == whole.folder
    assert max(max(row) for row in part.rows) < len(part.train_set)


@pytest.mark.parametrize("domains", [[], ["music"]])
def test_unknown_domains_are_named(make_data, domains):
    with pytest.raises(ValueError, match=r"data.train_domains=.* must name some .* \['arithmetic', 'letters'\]"):
        prepared(make_data, train_domains=domains)
