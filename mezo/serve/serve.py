"""What `mezo serve` does: a run that is trained, and served meanwhile, until somebody ends it."""

import functools
import os
import socket
from dataclasses import dataclass

from mezo.api import begin, loaded, longer, reopen, with_adapter_options, with_layers
from mezo.config import Config
from mezo.data.rewards import trusted_reward
from mezo.errors import UserError, require
from mezo.progress import say
from mezo.run.directory import RunDirectory, refuse_existing
from mezo.run.trajectory import read_trajectory
from mezo.serve.address import announced
from mezo.serve.admission import Admission
from mezo.serve.endpoints import Endpoints
from mezo.serve.http import Server
from mezo.serve.runtime import ServingRuntime
from mezo.serve.session import Session
from mezo.serve.signals import pausing
from mezo.serve.versions import NAME
from mezo.tasks import with_objective


@dataclass(frozen=True)
class Serving:
    """How a run is served.

    Args:
        host, port: where; port 0 takes a free one.
        api_key: that all endpoints ask for, but for those of health; "" asks for none.
        versions: of the adapter that are held at once: promoted, the next one, and pinned ones.
        max_latency_cost: see `Admission`.
        user_tokens: see `ServingRuntime`.
    """

    host: str = "127.0.0.1"
    port: int = 30000
    api_key: str = ""
    versions: int = 4
    max_latency_cost: float = 0.1
    user_tokens: int = 16384

    def __post_init__(self):
        require(0 <= self.port < 65536, f"--port must be from 0 to 65535, got {self.port}: choose another")
        require(2 <= self.versions <= 64, f"--versions must be from 2 to 64, got {self.versions}: choose another")
        cost = self.max_latency_cost
        require(0 <= cost <= 10, f"--max-latency-cost must be from 0 to 10 (0.1 is 10 %), got {cost:g}: choose another")
        require(self.user_tokens >= 256, f"--user-tokens must be at least 256, got {self.user_tokens}: raise it")

    def bind(self) -> socket.socket:
        """The socket that is served at, which refuses connections until then. Raises UserError if it is in use."""
        bound = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((self.host, self.port))
            return bound
        except OSError as error:
            bound.close()
            where = f"--host {self.host} --port {self.port}"
            raise UserError(
                f"{where} cannot be listened at ({error.strerror}): choose another, or end who does"
            ) from error

    def runtime(self, bound: socket.socket, admission: Admission) -> functools.partial:
        """What makes the runtime, from the arguments of `SGLangRuntime`."""
        engine = {"host": self.host, "port": bound.getsockname()[1], "api_key": self.api_key or None}
        return functools.partial(
            ServingRuntime,
            admission=admission,
            versions=self.versions,
            user_tokens=self.user_tokens,
            engine_options=engine,
        )


def serve(config: Config, serving: Serving) -> int:
    """Start a run and serve it until it is interrupted; when it is trained it is served on.

    Args:
        config: the run's, of the SGLang runtime.
        serving: how it is served.
    Returns:
        Exit code: 0, or 130 where the training was interrupted.
    Raises:
        UserError: before anything is written.
        RunError: the engine is dead.
    """
    _refuse(config)
    config = with_objective(with_adapter_options(config).absolute())
    refuse_existing(config.machine.output_dir)
    config = with_layers(config)
    adapter = config.model.tuning.adapter
    admission = Admission(serving.max_latency_cost)
    with (
        pausing(admission),
        serving.bind() as bound,
        loaded(config, need="train", adapter=adapter, make=serving.runtime(bound, admission)) as (
            runtime,
            splits,
            took,
        ),
    ):
        trainer = begin(config, runtime, splits, took)
        session = Session(trainer.run, runtime, trainer.records, config.method.steps, trainer, splits.further)
        return _served(session, bound)


def serve_again(
    path: str, serving: Serving, machine: dict | None = None, reward: str = "", trust_reward: bool = False
) -> int:
    """Go on with a run and serve it; one that is finished is served as it is. Theta and the promoted version are those
    of its logs.

    Args:
        path: run directory.
        serving: how it is served.
        machine, reward, trust_reward: see `mezo.api.resume`.
    Returns:
        As `serve`.
    """
    run = RunDirectory.open(path)
    config = longer(run.read_config(), machine or {})
    _refuse(config)
    first_line, records = read_trajectory(run.trajectory)
    trusted = trusted_reward(config.method.reward, first_line.get("reward_hash"), reward, trust_reward, path)
    config, done = config.replace(reward=trusted), len(records)
    admission = Admission(serving.max_latency_cost)
    with (
        pausing(admission),
        serving.bind() as bound,
        loaded(config, need="train", done=done, make=serving.runtime(bound, admission)) as (runtime, splits, took),
    ):
        if run.result.is_file() and done >= config.method.steps:
            return _served(Session(run, runtime, records, config.method.steps, None, splits.further), bound)
        trainer = reopen(run, config, runtime, splits, took)
        session = Session(run, runtime, trainer.records, config.method.steps, trainer, splits.further)
        return _served(session, bound)


def _refuse(config: Config) -> None:
    """Raise UserError for what cannot be served."""
    name = config.machine.runtime.name
    require(name == "sglang", f"--runtime {name}: mezo serve runs on sglang: leave it out")
    require(not config.data.num_demonstrations, "--num-demonstrations is for mezo eval: leave it out")
    require(os.environ.get("WORLD_SIZE", "1") == "1", "mezo serve is one process: start it without torchrun; use --tp")


def _served(session: Session, bound: socket.socket) -> int:
    """Answer users for as long as a session lasts; return the exit code."""
    session.begin()
    server = Server(session.runtime.engine, bound, Endpoints(session).add)
    try:
        host, port = bound.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        with announced(session.directory.path, url):
            names = f"{session.model}:{NAME} is what was learnt, {session.model}:{NAME}@STEP a step of it"
            say(f"serving {session.model} at {url}: {names}")
            return session.carry_through()
    finally:
        server.close()
        session.directory.release()
