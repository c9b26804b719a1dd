"""`mezo verify`: backends against the reference on this machine."""

from dataclasses import dataclass

from rich.table import Table

from mezo.cli.parsing import parse
from mezo.errors import UserError
from mezo.progress import console as new_console
from mezo.progress import starting


@dataclass(frozen=True)
class Options:
    """Compare every available backend with the reference and the frozen vectors on this machine, bit for bit."""

    device: str = ""
    """Device to check; by default the CPU, and the GPU where there is one."""
    compiled: bool = False
    """Check what Triton compiles for an H100 (sm_90), run on this CPU instruction by instruction; no GPU is needed."""


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    options = parse(argv, "mezo verify", Options)
    starting()
    import mezo_kernels

    try:
        rows = mezo_kernels.verify(options.device or None, "sm_90" if options.compiled else None)
    except (RuntimeError, AssertionError, ValueError) as error:
        name = "--compiled" if options.compiled else f"--device {options.device}"
        raise UserError(f"{name}: {str(error).splitlines()[0]}") from error
    table = Table("backend", "check", "result", "detail", title="against the reference and the frozen vectors")
    for row in rows:
        table.add_row(row.backend, row.check, "ok" if row.ok else "MISMATCH", row.detail)
    new_console().print(table)
    return 0 if all(row.ok for row in rows) else 1
