"""The folder of a run: which one it is, a lock on it while the run lives, and clearing up after a failed start."""

import errno
import fcntl
import itertools
import os
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

RUN_DIR = "UPIT_RUN_DIR"  # environment variable by which the processes that a run starts know its folder
LAUNCHERS = {"RANK", "SLURM_PROCID"}  # of torchrun and SLURM, which start every rank themselves
LOCK = ".lock"
HELD_ELSEWHERE = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
RECORDS = ("metrics.csv", "config.yaml")  # which a resumed run would overwrite
WORTHLESS = ("config.yaml", "hparams.yaml", LOCK, "events.out.tfevents.*")  # while no step was trained

_locks: set[int] = set()  # file descriptors


class Lock:
    """A kernel lock on a folder, ``flock`` on ``<folder>/.lock``; it ends with the process, however that ends.

    Forked processes don't keep it alive. The file holds process id and host, for error messages.

    Raises: InUseError: another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / LOCK
        self.descriptor: int | None = None
        while self.descriptor is None:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
            if not self._acquire(descriptor):
                return
            if _is_file(descriptor, self.file):  # else its holder removed it meanwhile
                self.descriptor = descriptor
            else:
                os.close(descriptor)
        _locks.add(self.descriptor)
        os.ftruncate(self.descriptor, 0)
        os.write(self.descriptor, f"{os.getpid()} on {socket.gethostname()}".encode())

    def _acquire(self, descriptor: int) -> bool:
        """Whether the lock was taken; False on a file system without locks."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in HELD_ELSEWHERE:
                raise InUseError(self.file) from None
            self.file.unlink(missing_ok=True)
            warnings.warn(
                f"{str(self.file.parent)!r} can't be locked ({error.strerror}): take care that no other fit uses it",
                stacklevel=4,
            )
            return False
        return True

    def release(self) -> None:
        if self.descriptor is not None:
            self.file.unlink(missing_ok=True)
            os.close(self.descriptor)
            _locks.discard(self.descriptor)
            self.descriptor = None


class InUseError(ValueError):
    """A folder is locked by another process."""

    def __init__(self, file: Path) -> None:
        try:
            holder = file.read_text() or "unknown"
        except OSError:
            holder = "unknown"
        super().__init__(
            f"the run directory {str(file.parent)!r} is in use by a running fit, process {holder}: wait for its end, "
            "or stop it first"
        )


def check_free(folder: Path) -> None:
    """Raises: InUseError: a fit is running in the folder."""
    if (folder / LOCK).exists():
        Lock(folder).release()


def _is_file(descriptor: int, file: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), file.stat())
    return False


def _close_in_child() -> None:
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_close_in_child)


class RunDirectory:
    """The folder of one command. A context manager: its lock and :data:`RUN_DIR` last as long as the command.

    A start that fails before :attr:`began` is set is undone: what it renamed gets its name back, and a folder that was
    new is removed, unless something of value is in it.
    """

    def __init__(self) -> None:
        self.began = False  # training has
        self._lock: Lock | None = None
        self._before: set[Path] = set()  # what was in it
        self._made: list[Path] = []  # the folder and its parents, innermost first
        self._renamed: list[tuple[Path, Path]] = []  # from, to
        self._told = RUN_DIR in os.environ

    def choose(self, wanted: Path, ckpt_path: str | None, *, fits: bool) -> Path:
        """The folder of this command; a fit makes and locks it.

        A fit takes the wanted folder, or where that is taken one beside it, ``<wanted>-2`` and so on. A resumed run
        goes on in the folder of its checkpoint. Processes that a run starts share its folder. Under an external
        launcher (torchrun, SLURM) no rank may choose by itself: there a folder that holds a run is refused.

        Raises:
            ValueError: see above; or another fit is running in it.
            OSError: it can't be written.
        """
        if self._told:
            run = Path(os.environ[RUN_DIR])
            if fits:
                run.mkdir(parents=True, exist_ok=True)
            return run
        launched = bool(LAUNCHERS & os.environ.keys())
        if ckpt_path:
            found = Path(ckpt_path).resolve().parent
            run = found.parent if found.name == "checkpoints" else wanted
        elif launched:
            run = wanted
            if (run / "experts").exists():  # written only once all ranks have passed here
                raise ValueError(f"trainer.default_root_dir={str(run)!r} holds a run already; name another directory")
        elif fits:
            run = self._free(wanted)
        else:
            run = next(run for run in _names(wanted) if _is_empty(run))
        if fits and self._lock is None:
            self._make(run)
            if all(os.environ.get(name, "0") == "0" for name in (*LAUNCHERS, "NODE_RANK")):
                self._lock = Lock(run)
        if self._lock is not None:
            self._keep_records(run)
            self._before = set(run.iterdir()) - {run / LOCK}
        os.environ[RUN_DIR] = str(run)
        return run

    def _free(self, wanted: Path) -> Path:
        """The first folder that is empty and not locked, made and locked."""
        for run in _names(wanted):
            if not _is_empty(run):
                continue
            self._make(run)
            with suppress(
                InUseError, FileNotFoundError
            ):  # another fit was faster, or its failed start removed the folder
                self._lock = Lock(run)
                if _is_empty(run):
                    return run
                self._lock.release()
        raise AssertionError("unreachable")

    def _make(self, run: Path) -> None:
        self._made = [path for path in (run, *run.parents) if not path.exists()]
        run.mkdir(parents=True, exist_ok=True)

    def _keep_records(self, run: Path) -> None:
        """Rename what a resumed run would overwrite: metrics.csv becomes metrics-1.csv, and so on."""
        for name in RECORDS:
            file = run / name
            if file.exists():
                free = next(i for i in itertools.count(1) if not file.with_stem(f"{file.stem}-{i}").exists())
                self._renamed.append((file, file.rename(file.with_stem(f"{file.stem}-{free}"))))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._told:
            os.environ.pop(RUN_DIR, None)
        if kind is not None and not self.began and self._lock is not None:
            self._undo()
        if self._lock is not None:
            self._lock.release()

    def _undo(self) -> None:
        assert self._lock is not None
        new = [path for path in self._lock.file.parent.iterdir() if path not in self._before]
        if all(_is_worthless(path) for top in new for path in (top, *top.rglob("*"))):
            for path in new:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for before, after in self._renamed:
            after.replace(before)
        for folder in self._made:
            with suppress(OSError):  # something is in it
                folder.rmdir()


def _names(wanted: Path) -> Iterator[Path]:
    yield wanted
    for number in itertools.count(2):
        yield wanted.with_name(f"{wanted.name}-{number}")


def _is_empty(folder: Path) -> bool:
    return not folder.exists() or all(path.name == LOCK for path in folder.iterdir())


def _is_worthless(path: Path) -> bool:
    return path.is_dir() or any(path.match(pattern) for pattern in WORTHLESS)
