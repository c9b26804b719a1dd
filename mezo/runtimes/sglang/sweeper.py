"""Ends an engine for good, however its trainer ends: its processes, its folder, its files in shared memory.

A trainer that is killed can do nothing any more. So this file, as a script in a process of its own, waits for the end
of the trainer and sweeps after it. It needs the standard library alone and starts in a few hundredths of a second.
"""

import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

SHARED = "/dev/shm"
OF_ENGINES = ("sgl_shm_", "sglang_loads_", "sem.loky-", "nccl-", "cuda.shm.")
"""Begin the names of an engine's files in shared memory; what else it uses there may be a user's model."""
UNNAMED = "sglang_loads_"
LOOK = 2.0  # seconds between looks at what an engine has in shared memory
PAUSE = 0.02  # seconds for killed processes to go
PATIENCE = 60.0  # seconds after which a process that does not go is left alone


def processes(folder: str, variable: str) -> list[int]:
    """Ids of the processes that an engine consists of: those whose environment names its folder.

    Args:
        folder: the engine's.
        variable: of the environment, whose value ends in the folder after a colon.
    """
    begin, end = variable.encode() + b"=", b":" + os.fsencode(folder)
    return [pid for pid in _pids() if pid != os.getpid() and _names(pid, begin, end)]


def sweep(folder: str, variable: str, files: set[str] = frozenset(), beside: tuple[str, ...] = ()) -> None:
    """Kill an engine's processes, then remove its files. Once it is done it does nothing.

    Args:
        folder: the engine's.
        variable: as in `processes`.
        files: of it in shared memory, as `shared_files` found them earlier.
        beside: further folders of it.
    """
    deadline = time.monotonic() + PATIENCE
    while (pids := processes(folder, variable)) and time.monotonic() < deadline:
        files = files | shared_files(pids)
        for pid in pids:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(PAUSE)
    for path in files:
        with suppress(OSError):
            os.unlink(path)
    for path in (folder, *beside):
        shutil.rmtree(path, ignore_errors=True)


def shared_files(pids: list[int]) -> set[str]:
    """Files in shared memory of kinds that only engines have, which processes use or whose names hold their ids."""
    ids, used = set(map(str, pids)), set()
    for pid in pids:
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
            used |= {line.partition(f"{SHARED}/")[2] for line in lines}
    with suppress(OSError):
        used |= {name for name in os.listdir(SHARED) if ids & set(name.replace("-", "_").split("_"))}
    return {f"{SHARED}/{name}" for name in used if name.startswith(OF_ENGINES) and "/" not in name}


def orphans(since: float) -> set[str]:
    """Files that a dead process of an engine left in shared memory, of the kind whose names do not tell whose they are.

    Args:
        since: time before which none of them was written.
    """
    unused = {f"{SHARED}/{name}" for name in os.listdir(SHARED) if name.startswith(UNNAMED)} - shared_files([*_pids()])
    found = set()
    for path in unused:
        with suppress(OSError):
            facts = os.stat(path)
            found |= {path} if facts.st_uid == os.getuid() and facts.st_ctime >= since else set()
    return found


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())


def _names(pid: int, begin: bytes, end: bytes) -> bool:
    try:
        values = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it is gone, or somebody else's
        return False
    return any(value.startswith(begin) and value.endswith(end) for value in values)


def main(trainer: int, folder: str, variable: str, *beside: str) -> None:
    """Wait until standard input is closed, as it is when the trainer ends; then sweep. Standard output is closed last.

    Args:
        trainer: its process id; it has some of the engine's shared memory open, too.
        folder, variable, beside: as in `sweep`.
    """
    if os.fork():  # SGLang ends an engine by killing all descendants of the trainer: this is none of them
        return
    os.setsid()  # nor does it hear what a terminal says to the trainer
    os.chdir("/")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    began, seen, files = time.time(), set(), set()
    while not select.select([0], [], [], LOOK)[0]:
        pids = processes(folder, variable)
        seen |= set(pids)
        files |= shared_files([*pids, trainer]) if pids else set()
    sweep(folder, variable, files | shared_files([*seen]), beside)
    for path in orphans(began) if seen else ():
        with suppress(OSError):
            os.unlink(path)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
