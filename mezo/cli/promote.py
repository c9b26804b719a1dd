"""`mezo promote`: which step of a served run users are given."""

import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Annotated

from mezo.cli.parsing import POSITIONAL, parse
from mezo.errors import RunError, UserError


@dataclass(frozen=True)
class Options:
    """Give users another step of a run that is being served: a later one, or an earlier one to roll back."""

    run: Annotated[str, POSITIONAL]
    """Run directory that mezo serve is serving."""
    step: int
    """Number of steps, from 0; the log rebuilds what they made."""
    api_key: str = ""
    """The server's; without it the environment variable MEZO_API_KEY, or none."""


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    options = parse(argv, "mezo promote", Options)
    from mezo.serve.address import address_of

    url, key = address_of(options.run), options.api_key or os.environ.get("MEZO_API_KEY", "")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    body = json.dumps({"step": options.step}).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/mezo/promote", body, headers)) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        why = error.read().decode(errors="replace")
        if error.code in (401, 403):
            raise UserError(f"the server of {options.run} asks for its key: give --api-key, or MEZO_API_KEY") from error
        raise UserError(f"the server of {options.run} refused: {why}") from error
    except OSError as error:
        raise RunError(
            f"the server of {options.run} at {url} does not answer ({error}): is it still running?"
        ) from error
    print(f"users of {options.run} are given step {answer['promoted']}, rebuilt in {answer['seconds']:.2f} s")
    return 0
