"""The `mezo` command. A command's file is imported when it is called: `mezo --help` costs no library.

Subcommands of a parser library would import the options of all commands, and what these import, for each call.
"""

import atexit
import difflib
import importlib
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from types import FrameType

from mezo.errors import RunError, Terminated, UserError

GRACE = 15  # seconds that a command has to put its things away
AGAIN = 0.5  # seconds after which it is looked whether it does
COMMANDS = {
    "Start here": {
        "demo": "fine-tune a small model on movie reviews, from download to a report",
        "tasks": "list what --task takes: prompts, answers, objectives",
        "models": "list model families, and what was proved of each",
    },
    "Train": {
        "train": "fine-tune a model with forward passes only; --resume RUN continues a run",
        "serve": "serve a model and fine-tune it on the same engine; --resume RUN goes on",
        "promote": "give users of a served run another step of it",
        "tune": "choose lr and eps by short runs; --resume DIR continues a sweep",
    },
    "Look at runs": {
        "eval": "score a run, any adapter, or a model without one",
        "report": "what finished runs did, and where time and tokens went; also as a web page with curves",
        "leaderboard": "finished runs beside each other, at the rows they scored",
        "trajectory": "show, verify or truncate a run's log",
    },
    "Take results away": {
        "export": "write a run's adapter, the base model with the adapter merged, or the trained model",
        "push": "share a run on the Hugging Face hub: adapter, card, and the log that rebuilds it",
        "replay": "rebuild a run's adapter or model from its log",
    },
    "Check": {
        "env": "versions, devices and backends of this machine, and what is missing: for bug reports",
        "verify": "compare every backend with the reference on this machine, bit for bit",
        "reproduce": "run a published experiment and print its figure beside ours",
    },
}
"""Commands by what they are for; the file of each is mezo/cli/NAME.py, whose `main(argv)` returns the exit code."""


def usage() -> str:
    """What `mezo --help` prints."""
    lines = ["usage: mezo COMMAND [options]"]
    for title, commands in COMMANDS.items():
        lines += ["", f"{title}:", *(f"  {name:<11} {summary}" for name, summary in commands.items())]
    return "\n".join(
        [*lines, "", "mezo COMMAND --help lists a command's options; mezo --version says which one this is."]
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        0, 1 (the run or check failed), 2 (a mistake in the call), 130 (Ctrl-C), 143 (SIGTERM) or 129 (SIGHUP).
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    names = [name for commands in COMMANDS.values() for name in commands]
    if argv[0] == "--version":
        print(f"mezo {version('mezo-kernels')}")
        return 0
    if argv[0] not in names:
        near = difflib.get_close_matches(argv[0], names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return _fail(f"unknown command {argv[0]!r}: expected one of {', '.join(names)}{hint}", 2)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # before OpenMP is loaded: threads that spin for long where they wait take a core from whom they wait for
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    warnings.filterwarnings("ignore", module="torchvision")  # SGLang brings it; nothing here looks at pictures
    try:
        with _ending_on_signals(), _saying_what_begins(), _leaving_no_cache():
            return importlib.import_module(f"mezo.cli.{argv[0]}").main(argv[1:])
    except UserError as error:
        return _fail(str(error), 2)
    except RunError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:  # whoever read the output has enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where Python writes what is left as it ends
        return 128 + signal.SIGPIPE
    except OSError as error:
        return _fail(f"{error}; nothing that was logged is lost, `mezo train --resume RUN` continues a run", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Terminated as error:
        return _fail(f"ended by {signal.Signals(error.code - 128).name}", error.code)


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end the command by an exception, so that it puts its things away; a second one kills it.

    The exception is raised again where it was lost, as Python loses one that comes up in a destructor or in a callback
    of ctypes: while numba compiles, three of sixty were. And the time kills it, where something takes for ever. An
    ignored signal, as by nohup, stays ignored.
    """
    numbers = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, _end)
    try:
        yield
    finally:
        if numbers:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        if numbers:  # a Ctrl-C too many would interrupt what Python puts away at its end
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _saying_what_begins() -> Iterator[None]:
    """Show the lines of `mezo.progress` on standard error; of several processes, those of the first."""
    log, handler = logging.getLogger("mezo"), logging.StreamHandler()
    before, wanted = log.level, logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    log.addHandler(handler), log.setLevel(wanted)
    log.propagate = False  # SGLang gives the root logger a handler of its own
    try:
        yield
    finally:
        log.removeHandler(handler), log.setLevel(before)
        log.propagate = True


@contextmanager
def _leaving_no_cache() -> Iterator[None]:
    """Remove the folder for compiled code that importing torch makes in TMPDIR, where nothing came to lie in it."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    try:
        yield
    finally:
        if before is None and (made := os.environ.get("TORCHINDUCTOR_CACHE_DIR")):
            with suppress(OSError):
                os.rmdir(made)


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    begun = time.monotonic()

    def again(*_) -> None:
        if time.monotonic() - begun > GRACE:
            os.kill(os.getpid(), number)
        if not _is_handled():
            raise Terminated(number)

    signal.signal(signal.SIGALRM, again)
    signal.setitimer(signal.ITIMER_REAL, AGAIN, AGAIN)
    raise Terminated(number)


def _is_handled() -> bool:
    """Whether the code that runs now puts things away because of a `Terminated`, and not as if none had come."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, Terminated):
        error = error.__context__
    return error is not None


def _fail(message: str, code: int) -> int:
    print(f"mezo: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
