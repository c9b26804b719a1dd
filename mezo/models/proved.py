"""What runs of the tests have shown of each model family, as `mezo models` and README print it."""

import json
from pathlib import Path

TABLE = Path(__file__).with_name("proved.json")
"""By `model_type`: what `tests/models/test_every_family.py` and `tests/runtimes/sglang/test_every_family.py` saw."""

HEAD = (
    "family",
    "trained by default",
    "logits by",
    "trunk cache keeps",
    "whole under `--head classification`",
    "`--runtime sglang`, on a CPU",
)
FIELDS = ("trained", "logits", "trunk", "classes", "sglang")
UNKNOWN = "not run"


def proved() -> dict[str, dict[str, str]]:
    """Fields of each family by name, in alphabetical order.

    >>> proved()["gpt2"]["trained"]
    'c_attn'
    """
    return json.loads(TABLE.read_text())


def record(family: str, **fields: str) -> None:
    """Write what was seen of a family into the table; other fields of it stay."""
    table = proved() if TABLE.exists() else {}
    table[family] = table.get(family, {}) | fields
    TABLE.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")


def rows() -> list[tuple[str, ...]]:
    """The table with its head, as text."""
    return [HEAD, *((name, *(fields.get(f, UNKNOWN) for f in FIELDS)) for name, fields in proved().items())]


def markdown() -> str:
    """The table as README has it."""
    head, *body = ("| " + " | ".join(row) + " |" for row in rows())
    return "\n".join([head, "|" + "---|" * len(HEAD), *body])
