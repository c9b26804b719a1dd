"""`mezo verify`: backends against the reference on this machine."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from mezo.cli.parsing import parse
from mezo.errors import UserError


@dataclass(frozen=True)
class Options:
    """Compare every available backend with the reference and the frozen vectors on this machine, bit for bit."""

    device: str = ""
    """Device to check; by default the CPU, and the GPU where there is one."""


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    options = parse(argv, "mezo verify", Options)
    import mezo_kernels

    try:
        rows = mezo_kernels.verify(options.device or None)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {options.device}: {str(error).splitlines()[0]}") from error
    table = Table("backend", "check", "result", "detail", title="against the reference and the frozen vectors")
    for row in rows:
        table.add_row(row.backend, row.check, "ok" if row.ok else "MISMATCH", row.detail)
    Console().print(table)
    return 0 if all(row.ok for row in rows) else 1
