"""``upit report``: one page that holds every picture and loads nothing."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from upit.cli.main import main
from upit.report.page import page
from upit.report.pictures import PICTURES
from upit.report.run import Run, flatten


class Reader(HTMLParser):
    """Collects images, what is loaded, and the text of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: dict[str, str] = {}
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        if tag == "img":
            self.images[found["alt"]] = found["src"]
        self.loaded += [found[key] for key in ("src", "href", "srcset", "action") if key in found]


@pytest.fixture(scope="module")
def other(pictured, tmp_path_factory):
    """The same run with another setting and without routing, as an older run would be."""
    run = tmp_path_factory.mktemp("other") / "other"
    shutil.copytree(pictured, run)
    shutil.rmtree(run / "routing")
    settings = (run / "settings.json").read_text()
    (run / "settings.json").write_text(settings.replace('seed_fraction": 0.1', 'seed_fraction": 0.25'))
    return run


def test_page_of_one_run_holds_every_picture_and_loads_nothing(pictured, tmp_path, capsys):
    file = tmp_path / "deep" / "report.html"
    main(["report", str(pictured), "--output", str(file)])
    assert str(file) in capsys.readouterr().out
    text = file.read_text()
    reader = Reader(text)
    assert {f"{picture.title}, {pictured.name}" for picture in PICTURES.values()} <= set(reader.images)
    assert all(source.startswith("data:image/png;base64,") for source in reader.images.values())
    assert all(link.startswith(("data:", "#")) for link in reader.loaded)
    assert {link[1:] for link in reader.loaded if link[0] == "#"} <= set(reader.ids)
    assert not re.search(r"https?://|<script|@import|url\(", text)
    final = json.loads((pictured / "report.json").read_text())["stages"]["final"]["average"]
    assert f"{final['loss']:.3f} nats" in text


def test_runs_stand_side_by_side(pictured, other):
    text = page([Run(pictured), Run(other)])
    images = Reader(text).images
    assert {"Held-out loss of all runs", "Exact match of the last stage"} <= set(images)
    assert f"Family tree, {other.name}" in images
    assert f"Load, {pictured.name}" in images
    assert f"Load, {other.name}" not in images
    assert text.count("not in this run") == sum(tag.startswith("router/") for tag in PICTURES)
    differing = text.split("What differs:")[1].split("</table>")[0]
    assert "seed_fraction</td><td>0.1</td><td>0.25</td>" in differing
    assert "num_experts" not in differing


def test_runs_of_one_name_are_told_apart(pictured, tmp_path):
    twins = [tmp_path / folder / "run" for folder in ("a", "b")]
    for twin in twins:
        twin.mkdir(parents=True)
        shutil.copy(pictured / "metrics.csv", twin)
    images = Reader(page([Run(twin) for twin in twins])).images
    assert {f"{PICTURES['eval/loss_curves'].title}, {twin}" for twin in twins} <= set(images)


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "nothing"), "--output", str(tmp_path / "page.html")])
    assert "holds no metrics.csv" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("name", ["report.json", "upcycling/lineage.json", "metrics.csv"])
def test_a_damaged_file_of_a_run_is_named(pictured, tmp_path, capsys, name):
    shutil.copytree(pictured, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(b"\xff{")
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "page.html")])
    assert name in capsys.readouterr().err


def test_a_running_run_has_a_page_already(pictured, tmp_path):
    """Only what a fit writes before its swap is there."""
    shutil.copy(pictured / "metrics.csv", tmp_path)
    text = page([Run(tmp_path)])
    assert len(Reader(text).images) == 1
    assert "not in this run" in text


def test_names_are_escaped(pictured, tmp_path):
    run = tmp_path / "<b>&"
    run.mkdir()
    shutil.copy(pictured / "metrics.csv", run)
    assert "<b>&" not in page([Run(run)])


def test_settings_are_flat():
    config = {
        "seed_everything": 7,
        "ckpt_path": None,
        "trainer": {
            "max_epochs": 2,
            "logger": ["big"],
            "callbacks": [{"class_path": "lightning.x.Y"}, {"class_path": "callbacks.Z", "init_args": {"a": 1}}],
        },
        "harvest": {"every_n_steps": 3},
        "upcycling": {"class_path": "callbacks.Upcycling", "init_args": {"merge": {"class_path": "upit.x.Slerp"}}},
        "data": {"class_path": "d.Data", "init_args": {"families": {"a": {"b": {}}}, "path": None}},
    }
    flat = flatten(config)
    assert flat["seed_everything"] == 7
    assert flat["trainer.max_epochs"] == 2
    assert "trainer.logger" not in flat
    assert flat["harvest.every_n_steps"] == 3
    assert flat["z.a"] == 1
    assert not any("lightning" in name for name in flat)
    assert (flat["upcycling"], flat["upcycling.merge"]) == ("Upcycling", "Slerp")
    assert (flat["data.families"], flat["data.path"]) == ("{'a': {'b': {}}}", "None")
