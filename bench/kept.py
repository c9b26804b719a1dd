"""Results of a part of the GPU day, on disk as soon as they are there."""

import json
from collections.abc import Callable
from pathlib import Path

import torch


class Kept:
    """Rows by name, each written when it has been measured. A later start measures what is missing or failed.

    Args:
        path: the part's JSON; what an earlier start left there is kept.
        facts: written beside the rows.
    """

    def __init__(self, path: Path, facts: dict):
        self.path, self.facts = path, facts
        self.rows = json.loads(path.read_text()).get("rows", {}) if path.exists() else {}

    def once(self, name: str, measure: Callable[[], dict], needed: bool = True) -> dict:
        """The row of a name, measured unless it is there.

        Args:
            name: of the row.
            measure: its numbers; an error becomes the row.
            needed: an error fails the part, unless it is that memory does not suffice.
        """
        if name in self.rows and not {"error", "not measured"} & self.rows[name].keys():
            return self.rows[name]
        try:
            self.rows[name] = measure()
        except Exception as error:
            needed = needed and not isinstance(error, torch.OutOfMemoryError)
            self.rows[name] = {"error" if needed else "not measured": f"{type(error).__name__}: {error}"}
        self._write({"ok": False, "error": "it did not come to its end"})
        return self.rows[name]

    def end(self, **found: object) -> dict:
        """Write what there is besides rows. The part is ok unless a row failed, or `ok` says otherwise."""
        found = {"ok": not any("error" in row for row in self.rows.values()), **found}
        self._write(found)
        return found

    def _write(self, found: dict) -> None:
        whole = {**self.facts, **found, **({"rows": self.rows} if self.rows else {})}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(whole, indent=1) + "\n")
        part.replace(self.path)
