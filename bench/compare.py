"""Compares two results of `make bench`: fails where an op's ratio to the copy of its own run fell by 10 %.

Run: python bench/compare.py OLD.json NEW.json
Times are never compared: they change with the machine and its load, a ratio to a copy timed in turn does so less.
The copy of a large row may still be 1.6 times as fast by where its pages lie: confirm a failure by a second run.
"""

import argparse
import json
import sys
from pathlib import Path

SLOWER, MOVED = 0.10, 0.03
COLUMN = "fraction_of_copy"
KEY = ("op", "rule", "shape", "dtype", "updates", "provider", "device")
OURS = "ours"


def ratios(path: Path) -> dict[tuple, float]:
    """The ratio to the copy of every row that has one, by what the row is."""
    try:
        rows = [row["extra_info"] for row in json.loads(path.read_text())["benchmarks"]]
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}; give a JSON that `make bench` wrote") from None
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is not a result of `make bench` ({type(error).__name__}: {error})") from None
    found = {tuple(str(row.get(name, "")) for name in KEY): row[COLUMN] for row in rows if COLUMN in row}
    if not found:
        raise SystemExit(f"{path} has no row with {COLUMN!r}: run all of `make bench`")
    return found


def compare(old: dict[tuple, float], new: dict[tuple, float]) -> tuple[list[tuple], list[tuple]]:
    """(rows that moved, those of ours that are slower): each (row, old ratio, new ratio, change)."""
    changes = [(key, old[key], new[key], new[key] / old[key] - 1) for key in old if key in new]
    moved = sorted((change for change in changes if abs(change[3]) >= MOVED), key=lambda change: change[3])
    return moved, [c for c in moved if c[0][KEY.index("provider")] == OURS and c[3] <= -SLOWER]


def main() -> int:
    """Print what moved; exit code 1 if something of ours is slower or is no longer measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args()
    old, new = ratios(options.old), ratios(options.new)
    if not old.keys() & new.keys():
        raise SystemExit(f"{options.old} and {options.new} have no row in common: were they timed on one device?")
    moved, slower = compare(old, new)
    print(f"{'change':>8} {'old':>8} {'new':>8}  fraction of a copy ({len(old.keys() & new.keys())} rows compared)")
    for key, before, after, change in moved:
        print(f"{change:+8.0%} {before:8.3f} {after:8.3f}  {' '.join(part for part in key if part)}")
    gone = [key for key in old if key not in new and key[KEY.index("provider")] == OURS]
    for key in gone:
        print(f"no longer measured: {' '.join(part for part in key if part)}")
    print(f"{len(slower)} of ours slower by {SLOWER:.0%} or more, {len(gone)} no longer measured")
    return 1 if slower or gone else 0


if __name__ == "__main__":
    sys.exit(main())
