"""Where a run is served: a file in its directory for as long as it is."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mezo.errors import UserError
from mezo.run.files import read_object, replace_file

FILE = "serve.json"


@contextmanager
def announced(run: Path, url: str) -> Iterator[None]:
    """Leave the address in the run directory meanwhile."""
    path = run / FILE
    replace_file(path, json.dumps({"url": url, "pid": os.getpid()}).encode())
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def address_of(run: str) -> str:
    """URL of the server of a run. Raises UserError if none is running."""
    path = Path(run) / FILE
    if not path.is_file():
        raise UserError(f"{run} is not served: start its server first, mezo serve --resume {run}")
    return read_object(path)["url"]
