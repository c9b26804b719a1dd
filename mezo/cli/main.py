"""The `mezo` command, as USAGE lists it. Heavy imports wait until a command needs them."""

import importlib
import os
import sys
import warnings

from mezo.errors import RunError, UserError

USAGE = """usage: mezo COMMAND [options]

  train    fine-tune a model with forward passes only; --resume RUN continues a run
  eval     score a run's adapter, any adapter, or a model without one
  replay   rebuild a run's adapter or model from its log
  export   write a run's adapter, the base model with the adapter merged, or the trained model
  import   make an adapter of someone else's ready for --adapter
  trajectory show, verify or truncate a run's log
  report   what finished runs did, and where time and tokens went; also as a web page with curves
  tune     choose lr and eps by short runs; --resume DIR continues a sweep
  tasks    list what --task takes: prompts, answers, objectives
  verify   compare every backend with the reference on this machine, bit for bit
  reproduce run a published experiment and print its figure beside ours
  demo     fine-tune a small model on movie reviews, from download to a report

mezo COMMAND --help lists a command's options."""

COMMANDS = {
    "train": "mezo.cli.train",
    "eval": "mezo.cli.eval",
    "replay": "mezo.cli.replay",
    "export": "mezo.cli.export",
    "import": "mezo.cli.import_",
    "trajectory": "mezo.cli.trajectory",
    "report": "mezo.cli.report",
    "tune": "mezo.cli.tune",
    "tasks": "mezo.cli.tasks",
    "verify": "mezo.cli.verify",
    "reproduce": "mezo.cli.reproduce",
    "demo": "mezo.cli.demo",
}
"""The file of each command: its `main(argv)` returns the exit code."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; exit code 0, 1 (the run or check failed), 2 (a mistake in the call) or 130 (Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        return _fail(f"unknown command {argv[0]!r}: expected one of {', '.join(COMMANDS)}", 2)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module="torchvision")  # SGLang brings it; nothing here looks at pictures
    try:
        return importlib.import_module(COMMANDS[argv[0]]).main(argv[1:])
    except UserError as error:
        return _fail(str(error), 2)
    except RunError as error:
        return _fail(str(error), 1)
    except OSError as error:
        return _fail(f"{error}; nothing that was logged is lost, `mezo train --resume RUN` continues a run", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(message: str, code: int) -> int:
    print(f"mezo: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
