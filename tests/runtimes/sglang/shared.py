"""Engines that tests share: the one that runs is given again to whoever asks for an engine with the same arguments."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch

from mezo.errors import RunError
from mezo.runtimes.sglang.engine import EngineHandle
from mezo.runtimes.sglang.scratch import Scratch

PAIRS = 3  # perturbations whose slots every engine has
LARGE = {"max_total_tokens": 32768, "max_prefill_tokens": 16384, "max_running_requests": 256}
ENVIRONMENT = ("TRITON_INTERPRET",)  # that an engine's processes read at their start


class Kept(EngineHandle):
    """A handle whose engine outlives the runtime that closes it, unless a process of it is dead."""

    def close(self) -> None:
        try:
            self.check_alive()
        except RunError:
            self.end()

    def end(self) -> None:
        """End the engine's processes."""
        if self.engine is not None:
            super().close()
            self.engine = None


class Engines:
    """At most one engine, and how many were started.

    Args:
        directory: stands for a run's, which an engine's log is named by.
    """

    def __init__(self, directory: Path):
        self.directory, self.starts = directory, 0
        self.key, self.handle, self.unguarded = "", None, False

    def take(self, arguments: dict, scratch: Scratch) -> EngineHandle:
        """In place of `EngineHandle`: an engine whose cache is empty, and whose guards are as they were."""
        if arguments.get("nnodes", 1) > 1:
            return EngineHandle(arguments, scratch)
        key = _key(arguments)
        if key != self.key or not self._begins():
            self.close()
            self.starts += 1
            own = Scratch(str(self.directory / str(self.starts)))
            self.handle, self.key = Kept(_large(arguments, own.path), own), key
            assert self._begins()
        return self.handle

    def _begins(self) -> bool:
        """Whether the engine serves anew: all requests answered, its cache empty, its guards as they should be."""
        if self.handle.engine is None:
            return False
        self.handle.scratch.keep_log = self.handle.training = False
        try:
            self.handle.call("test_begin", unguarded=self.unguarded)
            while not all(answer["flushed"] for answer in self.handle.call("flush")):
                pass
        except RunError:
            return False
        return True

    def close(self) -> None:
        """End the engine, if there is one."""
        if self.handle is not None:
            self.handle.end()
        self.key, self.handle = "", None


def _key(arguments: dict) -> str:
    """What must be equal: all but sizes, and the adapters by what they hold."""
    rest = {k: v for k, v in arguments.items() if k not in (*LARGE, "lora_paths", "max_loras_per_batch")}
    placeholder = Path(arguments["lora_paths"][0]["lora_path"])
    held = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(placeholder.iterdir())]
    assert len(arguments["lora_paths"]) <= 2 * PAIRS
    assert all(arguments.get(name, 0) <= size for name, size in LARGE.items())
    return json.dumps([rest, held, [os.environ.get(name) for name in ENVIRONMENT]], sort_keys=True)


def _large(arguments: dict, directory: Path) -> dict:
    """The same arguments with room for every test, and adapters that stay."""
    placeholder = directory / "placeholder"
    shutil.copytree(arguments["lora_paths"][0]["lora_path"], placeholder)
    names = [f"{sign}{k}" for k in range(PAIRS) for sign in ("plus", "minus")]
    adapters = [{"lora_name": name, "lora_path": str(placeholder), "pinned": True} for name in names]
    sizes = {} if torch.accelerator.is_available() else LARGE
    return {**arguments, **sizes, "lora_paths": adapters, "max_loras_per_batch": len(adapters) + 1}
