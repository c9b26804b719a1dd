"""The folder that holds all temporary files of an engine, and what ends the engine and the folder with this process."""

import fcntl
import hashlib
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mezo.errors import RunError, UserError
from mezo.runtimes.sglang import sweeper
from mezo.runtimes.sglang.inside.handshake import ENVIRONMENT

PREFIX = "mezo-engine-"
LOCK = "lock"
LOG = "engine.log"
LONGEST = 60  # characters of the path above the folder: a socket's whole path has at most 107
SPARE = 1 << 20  # bytes for sockets and the log
PATIENCE = 30  # seconds that the sweeper may take


class Scratch:
    """A folder for one engine; it and the engine's processes are gone after `close`, or when this process ends.

    A lock in the folder says that it is in use: folders whose processes were all killed are swept at the next start.

    Args:
        run: directory of the run, which the log is named by if it is kept.
        needed: bytes that will be written.
        beside: folders that go with it.
    Raises:
        UserError: there is no room for it, or no path that is short enough.
    """

    def __init__(self, run: str, needed: int = 0, beside: tuple[Path, ...] = ()):
        above = _above()
        for left in above.glob(f"{PREFIX}*/{LOCK}"):
            _sweep_if_dead(left)
        self.kept_log = above / f"{PREFIX}{hashlib.sha256(os.path.abspath(run).encode()).hexdigest()[:10]}.log"
        if (free := shutil.disk_usage(above).free) < (needed := needed + SPARE):
            raise UserError(_no_room(above, needed, f"{free:,} are free"))
        self.keep_log = False
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=above))
        self.log = self.path / LOG
        self._lock = _locked(self.path)
        self._sweeper = self._start_sweeper(beside)
        self._beside = tuple(map(str, beside))

    def _start_sweeper(self, beside: tuple[Path, ...]) -> subprocess.Popen:
        arguments = [str(os.getpid()), str(self.path), ENVIRONMENT, *map(str, beside)]
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", sweeper.__file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=[self._lock],
        )
        process.wait()  # it has left a process behind that is not a child of this one
        return process

    @contextmanager
    def holding_temporary_files(self) -> Iterator[dict[str, str]]:
        """Put the temporary files of this process here meanwhile; gives the variables that have others do the same."""
        before, tempfile.tempdir = tempfile.tempdir, str(self.path)
        try:
            yield {"TMPDIR": str(self.path), "SPT_NOENV": "1"}  # a new title would overwrite the environment
        finally:
            tempfile.tempdir = before

    def save(self, tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
        """Write a safetensors file here. Raises RunError if there is no room for it."""
        try:
            save_file(tensors, path, metadata=metadata)
        except (OSError, SafetensorError) as error:
            raise RunError(_no_room(path.parent, bytes_of(tensors), str(error))) from error

    def close(self) -> None:
        """End the processes and remove all files, but for the log where `keep_log` is set. Safe to call twice."""
        if self.keep_log and self.log.is_file():
            with suppress(OSError):
                self.log.replace(self.kept_log)
        if self._sweeper.stdin.closed:
            return
        self._sweeper.stdin.close()
        select.select([self._sweeper.stdout], [], [], PATIENCE)  # it closes its end when it is done
        self._sweeper.stdout.close()
        sweeper.sweep(str(self.path), ENVIRONMENT, beside=self._beside)  # should somebody have killed it
        os.close(self._lock)


def bytes_of(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes that tensors take."""
    return sum(tensor.nbytes for tensor in tensors.values())


def _above() -> Path:
    """The temporary directory; another one if its path is too long for a socket in it.

    Raises:
        UserError: there is none.
    """
    usual = tempfile.gettempdir()
    for path in (usual, "/tmp", "/var/tmp"):
        if len(path) <= LONGEST and os.access(path, os.W_OK | os.X_OK):
            return Path(path)
    raise UserError(
        f"TMPDIR {usual}: the engine's sockets need a path of at most {LONGEST} characters, and /tmp cannot be written:"
        " point TMPDIR to a shorter one"
    )


def _no_room(directory: Path, needed: int, why: str) -> str:
    return (
        f"{directory} has no room for the engine's temporary files: {needed:,} bytes are needed ({why}); free some, or"
        f" point TMPDIR to a directory with more, whose path has at most {LONGEST} characters"
    )


def _locked(folder: Path) -> int:
    """Make and take a folder's lock. It is taken before it has its name, so that nobody finds it free."""
    new = folder / f"{LOCK}.new"
    lock = os.open(new, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    new.rename(folder / LOCK)
    return lock


def _sweep_if_dead(lock: Path) -> None:
    """Sweep a folder whose lock is free: every process that could have done so was killed."""
    with suppress(OSError), open(lock, "r+") as file:  # it is another user's, or locked
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        sweeper.sweep(str(lock.parent), ENVIRONMENT)
