"""`mezo push`: a run for others, on the hub or in a folder."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mezo.cli.parsing import POSITIONAL, parse
from mezo.errors import UserError
from mezo.progress import starting


@dataclass(frozen=True)
class Options:
    """Share what a run kept: adapter or model, a card with its figures, and the log that rebuilds it."""

    run: Annotated[str, POSITIONAL]
    """Run directory."""
    repo: str = ""
    """OWNER/NAME on the Hugging Face hub, made if missing; `hf auth login` before."""
    output_dir: str = ""
    """Folder to create in place of an upload: what --repo would send."""
    private: bool = False
    """Make a new repository private."""


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    options = parse(argv, "mezo push", Options)
    if bool(options.repo) == bool(options.output_dir):
        raise UserError("mezo push: give --repo OWNER/NAME, or --output-dir for the folder alone")
    starting()
    from mezo.run.share import upload, write_share

    if options.output_dir:
        write_share(options.run, options.output_dir)
        print(f"wrote what {options.run} would share to {options.output_dir}")
        return 0
    with tempfile.TemporaryDirectory(prefix="mezo-push-") as scratch:
        folder = Path(scratch) / "share"
        write_share(options.run, str(folder))
        print(f"pushed {options.run} to {upload(str(folder), options.repo, options.private)}")
    return 0
