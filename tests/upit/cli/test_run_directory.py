"""The folder of a run: which one, its lock, and what is undone when a start fails."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from upit.cli.run_directory import LOCK, RUN_DIR, InUseError, Lock, RunDirectory, check_free
from upit.cli.sweep import Cell, fit

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    for name in (RUN_DIR, "RANK", "SLURM_PROCID", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)


def choose(wanted: Path, ckpt_path: Path | None = None, *, fits: bool = True) -> Path:
    with RunDirectory() as directory:
        directory.began = True
        return directory.choose(wanted, ckpt_path and str(ckpt_path), fits=fits)


# --- which folder -------------------------------------------------------------------------------------


def test_a_second_run_goes_beside_the_first(tmp_path):
    names = []
    for _ in range(3):
        run = choose(tmp_path / "quickstart")
        names.append(run.name)
        (run / "config.yaml").write_text("")
    assert names == ["quickstart", "quickstart-2", "quickstart-3"]
    assert choose(tmp_path / "quickstart", fits=False).name == "quickstart-4"
    assert not (tmp_path / "quickstart-4").exists()


@pytest.mark.parametrize("launcher", ["RANK", "SLURM_PROCID"])
def test_under_a_launcher_a_taken_directory_is_refused(tmp_path, monkeypatch, launcher):
    monkeypatch.setenv(launcher, "1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("")  # rank 0 was faster
    lock = Lock(tmp_path / "run")
    assert choose(tmp_path / "run") == tmp_path / "run"
    lock.release()
    (tmp_path / "run/experts").mkdir()
    with pytest.raises(ValueError, match=r"default_root_dir=.* holds a run already"):
        choose(tmp_path / "run")


def test_a_resumed_run_goes_on_in_the_directory_of_its_checkpoint(tmp_path):
    (tmp_path / "old/checkpoints").mkdir(parents=True)
    for ckpt_path in (tmp_path / "old/checkpoints/a.ckpt", tmp_path / "old/checkpoints/sharded.ckpt"):
        assert choose(tmp_path / "new", ckpt_path) == tmp_path / "old"
    assert choose(tmp_path / "new", tmp_path / "loose.ckpt") == tmp_path / "new"


def test_processes_that_a_run_starts_share_its_directory(tmp_path):
    with RunDirectory() as directory:
        run = directory.choose(tmp_path / "run", None, fits=True)
        assert os.environ[RUN_DIR] == str(run)
        assert choose(tmp_path / "other") == run
        assert os.environ[RUN_DIR] == str(run)
    assert RUN_DIR not in os.environ, "the next fit of this process has its own"


def test_records_are_kept_under_another_name(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for content in ("a", "b"):
        (tmp_path / "metrics.csv").write_text(content)
        choose(tmp_path, tmp_path / "checkpoints/a.ckpt")
    found = {file.name: file.read_text() for file in tmp_path.glob("*.csv")}
    assert found == {"metrics-1.csv": "a", "metrics-2.csv": "b"}


# --- its lock -----------------------------------------------------------------------------------------


def test_two_fits_started_at_once_have_a_directory_each(tmp_path):
    with RunDirectory() as one, pytest.MonkeyPatch.context() as patch:
        first = one.choose(tmp_path / "run", None, fits=True)
        patch.delenv(RUN_DIR)  # of another process
        assert choose(tmp_path / "run") == tmp_path / "run-2"
        with pytest.raises(InUseError, match=rf"'{first}' is in use by a running fit, process {os.getpid()} on"):
            choose(tmp_path / "new", first / "checkpoints/last.ckpt")
        assert choose(tmp_path / "new", first / "checkpoints/last.ckpt", fits=False) == first
        with pytest.raises(InUseError):
            check_free(first)
    check_free(first)
    assert not (first / LOCK).exists()


def test_a_killed_run_leaves_no_lock_though_its_loader_processes_live_on(tmp_path):
    script = (
        "import os, sys, time\nfrom pathlib import Path\nfrom upit.cli.run_directory import Lock\n"
        "lock = Lock(Path(sys.argv[1]))\n"
        "if not os.fork(): print(os.getpid(), flush=True)\ntime.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        child = int(run.stdout.readline())
        try:
            with pytest.raises(InUseError, match=f"process {run.pid} on"):
                Lock(tmp_path)
            run.send_signal(signal.SIGKILL)
            run.wait()
            os.kill(child, 0)
            Lock(tmp_path).release()
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match=r"can't be locked \(No locks available\)"):
        assert choose(tmp_path / "run") == tmp_path / "run"
    assert not list((tmp_path / "run").iterdir())


def test_a_sweep_does_not_remove_a_running_fit(tmp_path, capsys):
    lock = Lock(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    assert not fit(Cell("a", (), 0, tmp_path))
    assert (tmp_path / "tokenizer").exists()
    assert "is in use by a running fit" in capsys.readouterr().err
    lock.release()


# --- a start that fails -------------------------------------------------------------------------------


def fail(wanted: Path, *files: str, ckpt_path: Path | None = None, began: bool = False) -> None:
    with pytest.raises(KeyError), RunDirectory() as directory:  # noqa: PT012
        run = directory.choose(wanted, ckpt_path and str(ckpt_path), fits=True)
        directory.began = began
        for name in files:
            (run / name).parent.mkdir(exist_ok=True)
            (run / name).write_text("new")
        raise KeyError


def test_a_failed_start_removes_what_it_made(tmp_path):
    fail(tmp_path / "a/b/run", "config.yaml", "events.out.tfevents.1", "hparams.yaml")
    assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    fail(tmp_path / "run", "config.yaml")
    assert not list((tmp_path / "run").iterdir()), "an empty folder of the user's stays, and stays empty"


@pytest.mark.parametrize(("files", "began"), [(["experts/base.safetensors"], False), (["config.yaml"], True)])
def test_what_has_a_value_stays(tmp_path, files, began):
    fail(tmp_path / "run", *files, began=began)
    assert [str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*.*")] == files


def test_a_resume_that_fails_gives_the_records_their_names_back(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("config.yaml", "metrics.csv"):
        (tmp_path / name).write_text("old")
    fail(tmp_path, "config.yaml", ckpt_path=tmp_path / "checkpoints/a.ckpt")
    assert {file.name: file.read_text() for file in tmp_path.glob("*.*")} == {
        "config.yaml": "old",
        "metrics.csv": "old",
    }
