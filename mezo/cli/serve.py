"""`mezo serve`: a model that is served and learns meanwhile."""

import os
from dataclasses import dataclass, fields
from typing import Any

from mezo.cli.parsing import given
from mezo.cli.train import resumable
from mezo.config import Config
from mezo.errors import UserError
from mezo.progress import starting


@dataclass(frozen=True)
class Options:
    """Serve a model as OpenAI's API does, and fine-tune an adapter of it on the same engine meanwhile.

    --model, --output-dir and --task or --train-file make a run, as for mezo train. Users name the model M, what it has
    learnt M:mezo, and a step of it M:mezo@STEP. What they say of answers (POST /mezo/feedback), and further rows (POST
    /mezo/examples), are learnt from the next epoch on. GET /mezo/status and /mezo/metrics say how it goes. SIGUSR1, or
    POST /mezo/pause, holds training back; SIGUSR2, or POST /mezo/resume, lets it go on.
    """

    config: str = ""
    """YAML file that may give any of the options below by name, such as batch_size: 8; flags win over it."""
    resume: str = ""
    """Directory of a run to go on with, and to serve; a finished one is served as it is. Only options that say where,
    how or how far it is computed may be given beside it, and --reward."""
    trust_reward: bool = False
    """With --resume: run the code of the reward that the run names, if its file is the one the run began with."""
    host: str = "127.0.0.1"
    """Address to listen at."""
    port: int = 30000
    """Port to listen at; 0 takes a free one."""
    api_key: str = ""
    """Key that users send as a bearer token; without it the environment variable MEZO_API_KEY, or none."""
    versions: int = 4
    """Versions of the adapter held at once: the promoted one, room for the next, and pinned steps."""
    max_latency_cost: float = 0.1
    """By how much training may raise what users wait for, the 99th percentile of it, such as 0.1; 0: it runs while
    nobody is served alone."""
    user_tokens: int = 16384
    """Tokens of users' requests that are kept in the cache at once, on a CPU; on a GPU --engine-arg
    mem_fraction_static decides."""


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    values = given(argv, "mezo serve", Options, Config.options())
    path, trust = values.pop("resume", ""), values.pop("trust_reward", False)
    own = _own(values)
    if not path and trust:
        raise UserError("--trust-reward belongs to --resume, a new run has --reward: leave it out")
    if not path and values.get("adapter"):
        starting()
        from mezo.run.adapter import with_base

        values = with_base(values)
    reward = values.pop("reward", "") if path else ""
    machine = resumable(path, values) if path else {}
    config = None if path else Config.of(**{"runtime": "sglang", **values})
    starting()
    try:
        from mezo.serve.http import check_libraries
        from mezo.serve.serve import Serving, serve, serve_again
    except ImportError as error:
        raise UserError(f"mezo serve: {error}; install it: pip install 'mezo-kernels[sglang]'") from error
    check_libraries()

    serving = Serving(**own)
    return serve_again(path, serving, machine, reward, trust) if path else serve(config, serving)


def _own(values: dict[str, Any]) -> dict[str, Any]:
    """Takes the options that say how it is served out of those of the run."""
    names = [field.name for field in fields(Options) if field.name not in ("config", "resume", "trust_reward")]
    own = {name: values.pop(name) for name in names if name in values}
    return {"api_key": os.environ.get("MEZO_API_KEY", "")} | own
