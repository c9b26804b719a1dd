"""Starting SGLang's engine with MeZO's plugin in it, and talking to it without ever waiting for the dead."""

import asyncio
import gc
import json
import os
import re
import signal
import sys
import time
from contextlib import contextmanager, suppress
from importlib.metadata import entry_points
from pathlib import Path
from types import FrameType

import psutil
import torch
import zmq

from mezo.errors import RunError, Terminated, UserError
from mezo.runtimes.allocator import VARIABLES
from mezo.runtimes.sglang.inside.handshake import ENDED, METHOD, handshake
from mezo.runtimes.sglang.scratch import Scratch

POLL = 0.5  # seconds between looks at the engine's processes while an answer is awaited
PATIENCE = 1800.0  # seconds
TORCHRUN = re.compile(r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_ADDR|MASTER_PORT)$|TORCHELASTIC_")
NO_PLUGIN = (
    "MeZO's plugin is not in the SGLang engine: install the package (pip install -e .), so that its entry point is"
    " known, and keep SGLANG_PLUGINS unset or with mezo in it"
)


class EngineHandle:
    """A running engine.

    Args:
        arguments: of `sglang.Engine`.
        scratch: for its files and processes; closed with the engine, and by the caller if it does not start.
        patience: seconds that one request or call may take.
    Raises:
        UserError: the plugin would be missing, or the engine does not start; then with the engine's own log line.
    """

    def __init__(self, arguments: dict, scratch: Scratch, patience: float = PATIENCE):
        self.scratch, self.patience = scratch, patience
        self.model, self.training = arguments["model_path"], False
        _require_plugin()
        with handshake(scratch.path) as variables, scratch.holding_temporary_files() as others:
            self._start(arguments, {**variables, **others, **_environment(arguments)})
        self.processes = [psutil.Process(pid) for pid in self.engine.get_all_child_pids()]
        self.nodes, self.ended = arguments.get("nnodes", 1), scratch.path / ENDED

    def _start(self, arguments: dict, environment: dict[str, str | None]) -> None:
        """Start the engine in this environment, and remember what of it has to be ended."""
        contexts = _contexts()
        try:
            with _environ(environment), _output_to(self.scratch.log):
                self.engine = _started(arguments)
        except Exception as error:
            self.scratch.keep_log = True
            raise UserError(
                f"the SGLang engine did not start: {self._last_error() or error}; see {self.scratch.kept_log}"
            ) from error
        finally:
            self._contexts = [c for c in _contexts() if not any(c is other for other in contexts)]
            if not hasattr(self, "engine"):
                self._destroy_sockets()

    def follow(self) -> None:
        """On the second and later machines: wait until the trainer ends the engine.

        Raises:
            RunError: the engine ended without it.
        """
        while not self.ended.exists():
            self.check_alive()
            time.sleep(POLL)

    def call(self, method: str, **parameters) -> list[dict]:
        """Run one of our methods on every tensor-parallel rank; return what each of them answered.

        Args:
            method: of `mezo.runtimes.sglang.inside.worker.Worker`.
            parameters: scalars.
        Raises:
            RunError: a rank failed (which one, and why), or a process of the engine is dead.
            UserError: the plugin is not in the engine.
        """
        from sglang.srt.managers.io_struct import RpcReqInput, sock_recv, sock_send

        socket, deadline = self.engine.send_to_rpc, time.monotonic() + self.patience
        self.check_alive()
        sock_send(socket, RpcReqInput(method=METHOD + method, parameters=parameters))
        while not socket.poll(POLL * 1000):
            self.check_alive()
            if time.monotonic() > deadline:
                raise self._failure(f"the SGLang engine did not answer {method} for {self.patience:.0f} s")
        reply = sock_recv(socket)
        if not reply.success and f"has no attribute '{METHOD}" in reply.message:
            raise UserError(NO_PLUGIN)
        if not reply.success:
            raise self._failure(f"the SGLang engine failed in {method}: {reply.message}")
        return json.loads(reply.message)

    def generate(self, **request) -> list[dict]:
        """`Engine.generate`, given up when a process of the engine dies."""
        handler = signal.getsignal(signal.SIGTERM)
        try:
            return self.engine.loop.run_until_complete(self._guarded(request))
        finally:
            # the engine's first request takes SIGTERM for the event loop, which does not run between requests
            if self.engine.loop.remove_signal_handler(signal.SIGTERM):
                signal.signal(signal.SIGTERM, handler)

    async def _guarded(self, request: dict) -> list[dict]:
        task = asyncio.ensure_future(self.engine.async_generate(**request))
        deadline = time.monotonic() + self.patience
        try:
            while not (await asyncio.wait({task}, timeout=POLL))[0]:
                self.check_alive()
                if time.monotonic() > deadline:
                    raise self._failure(f"the SGLang engine did not answer for {self.patience:.0f} s")
            return task.result()
        except UserError:
            raise
        except ValueError as error:
            raise self._failure(f"the SGLang engine refused a request: {error}") from error
        finally:
            task.cancel()

    def check_alive(self) -> None:
        """Raise RunError if a process of the engine is gone."""
        for process in self.processes:
            if not process.is_running() or process.status() in ("zombie", "dead"):
                line = self._last_error()
                raise self._failure(f"the SGLang engine died (process {process.pid}){f': {line}' if line else ''}")

    def _failure(self, what: str) -> UserError | RunError:
        """The error of this phase: until training begins there is nothing to resume, and another runtime may do."""
        self.scratch.keep_log = True
        what = f"{what}; its log is {self.scratch.kept_log}"
        if self.training:
            return RunError(f"{what}; nothing that was trained is lost, resume the run")
        return UserError(f"{what}; --model {self.model} does not run there: use --runtime hf, or other --engine-arg")

    def close(self) -> None:
        """End the engine, and its tasks in this process: the event loop is the next engine's too."""
        if self.engine.tokenizer_manager is None:  # not the first machine
            self._shut_down()
            return
        if self.nodes > 1 and not self.scratch.keep_log:
            with suppress(RunError):
                self.call("end")
        tasks = [task for task in self.engine.tokenizer_manager.asyncio_tasks if not task.done()]
        for task in tasks:
            task.cancel()
        self.engine.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._shut_down()
        self.engine.loop.remove_signal_handler(signal.SIGQUIT)

    def _shut_down(self) -> None:
        self.scratch.close()  # before the engine kills its processes: they know what shared memory they use
        self.engine.shutdown()
        self._destroy_sockets()

    def _destroy_sockets(self) -> None:
        """A message to a dead process keeps its socket, and whoever collects the garbage waits for it forever."""
        for context in self._contexts:
            context.destroy(linger=0)

    def _last_error(self) -> str:
        """The last line of the engine's log that speaks of an error."""
        log = self.scratch.log
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
        wrong = [line.strip() for line in lines if re.search(r"error|exception|killed|signal", line, re.IGNORECASE)]
        return wrong[-1][:300] if wrong else ""


def _require_plugin() -> None:
    """Raise UserError if SGLang would not find or not load the plugin."""
    allowed = [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()]
    installed = any(point.name == "mezo" for point in entry_points(group="sglang.srt.plugins"))
    if not installed or (allowed and "mezo" not in allowed):
        raise UserError(NO_PLUGIN)


def _contexts() -> list[zmq.Context]:
    return [one for one in gc.get_objects() if issubclass(type(one), zmq.Context) and not one.closed]


def _started(arguments: dict):
    import sglang

    engine = sglang.Engine(custom_sigquit_handler=_ignore, **arguments)
    if engine.tokenizer_manager is None:
        return engine  # not the first machine: requests are taken there
    # Dead children are noticed by `check_alive`; SGLang's own watchdog would kill this process, and the run with it.
    engine.tokenizer_manager._subprocess_watchdog.stop()
    engine.tokenizer_manager.signal_handler_class = _Signals
    return engine


def _ignore(number: int, frame: FrameType | None) -> None:
    """A child of the starting engine failed: that shows when the engine waits for it."""


class _Signals:
    """What the engine's part in this process does on a signal: a child's cry for help is left to `check_alive`."""

    def __init__(self, tokenizer_manager: object):
        pass

    def sigterm_handler(self, signum: int | None = None, frame: FrameType | None = None) -> None:
        """SIGTERM while the first request runs."""
        raise Terminated(signal.SIGTERM)

    def running_phase_sigquit_handler(self, signum: int | None = None, frame: FrameType | None = None) -> None:
        """SIGQUIT of a child."""


def accelerated() -> bool:
    """True if SGLang has a GPU to run on."""
    return torch.accelerator.is_available()


def blackwell() -> bool:
    """Whether SGLang runs on a GPU of NVIDIA's Blackwell generation (sm_100, sm_120)."""
    return torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability()[0] >= 10


def _environment(arguments: dict) -> dict[str, str | None]:
    """What SGLang's processes need in their environment, None for what they must not see; a user's own settings win."""
    # torchrun's addresses belong to the trainers: an engine's ranks meet elsewhere
    hidden = dict.fromkeys(name for name in os.environ if TORCHRUN.match(name))
    # on the second and later machines `Engine` would not return otherwise
    hidden["SGLANG_BLOCK_NONZERO_RANK_CHILDREN"] = "0"
    if accelerated():
        # else Triton's products of float32, in adapters and attention, are rounded to TF32, by about 1e-3
        exact = {"TRITON_F32_DEFAULT": os.environ.get("TRITON_F32_DEFAULT", "ieee")}
        return hidden | exact if arguments.get("dtype") == "float32" else hidden
    tp, cores = arguments.get("tp_size", 1), sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // tp)
    threads = min(share, int(os.environ.get("OMP_NUM_THREADS") or share))
    # a thread that waits must sleep: one that spins takes the core of the process it waits for (8.8 s for ten tiny
    # steps on two busy cores, 0.5 s asleep)
    wanted = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_WAIT_POLICY": "PASSIVE", **VARIABLES}
    hidden["GOMP_SPINCOUNT"] = None  # the command's, for its own threads, which would win over the policy
    if tp > 1:
        groups = [cores[i * share : (i + 1) * share] or cores[-1:] for i in range(tp)]
        wanted["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, group)) for group in groups)
    ours = {name: os.environ.get(name, value) for name, value in wanted.items()}
    return {**hidden, "OMP_NUM_THREADS": str(threads), **ours}


def engine_environment():
    """Context in which SGLang's modules are imported as the processes of an engine of one rank import them."""
    return _environ(_environment({}))


@contextmanager
def _environ(values: dict[str, str | None]):
    """Environment variables for the processes started meanwhile; None removes one."""
    before = {name: os.environ.get(name) for name in values}
    _set_environ(values)
    try:
        yield
    finally:
        _set_environ(before)


def _set_environ(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def _output_to(path: Path):
    """Send standard output and error, of this process and of those it starts meanwhile, to a file."""
    sys.stdout.flush(), sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.dup2(file, 1), os.dup2(file, 2)
        yield
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(saved[0], 1), os.dup2(saved[1], 2)
        for descriptor in (*saved, file):
            os.close(descriptor)
