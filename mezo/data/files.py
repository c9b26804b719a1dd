"""Rows of files in every format that `datasets` reads, of folders, of the hub, and of Python objects."""

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from mezo.config.data import HUB, MEMORY
from mezo.data.jsonl import parse_text, read_jsonl, refuse_binary, refuse_odd_line
from mezo.data.task import Row
from mezo.errors import UserError

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

SMALL = 16 << 20  # bytes of JSON that are read line by line, with a message for each bad one; a larger file is mapped
BATCH = 20_000  # rows that lie together in a table on the disk
LARGE = 100_000  # rows of a training set, from which on it is not tokenised at the start
FORMATS = {
    ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow",
    ".jsonl": "json", ".ndjson": "json", ".json": "json",
}  # fmt: skip
"""By the end of a file's name."""
MADV_DONTNEED = 4  # of Linux: pages of a file are read again where they are needed
MAPS = "/proc/self/maps"
MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
"""By a file's first bytes, which say more than its name."""
SPLITS = {"train": ("train",), "dev": ("validation", "dev", "valid"), "test": ("test",)}
"""What the splits are called in a folder or on the hub, in the order in which they are looked for."""


@dataclass(frozen=True)
class Stored:
    """The rows of one split as they are stored.

    Args:
        source: as the user named it.
        rows: a list, in which an error stands for a row that could not be read; or a `datasets.Dataset`, which is
            mapped from the disk.
        unit: what a row is called in messages: "line" or "row".
        classes: names of the classes of each column that `datasets` knows to be labels.
        untyped: every value is text, as in CSV.
        whole: the table is all that is in its files.
    """

    source: str
    rows: "Sequence[Row | UserError] | Dataset"
    unit: str = "row"
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    untyped: bool = False
    whole: bool = False

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """Names of the fields, of a list those of its first hundred rows."""
        if not isinstance(self.rows, list):
            return tuple(self.rows.column_names)
        return tuple(dict.fromkeys(name for row in self.rows[:100] if not isinstance(row, UserError) for name in row))

    def __iter__(self) -> Iterator[Row | UserError]:
        """The rows; a field without a value is left out where the format has it in every row."""
        if isinstance(self.rows, list):
            yield from self.rows
            return
        for row in self.rows:
            yield without_empty(row)

    def row(self, number: int) -> Row:
        """One row of a table. What was mapped for it leaves memory again: with the pages around it that is a lot."""
        row = without_empty(self.rows[number])
        for address, length in self._mapped:
            _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), MADV_DONTNEED)
        return row

    @functools.cached_property
    def _mapped(self) -> list[tuple[int, int]]:
        """(address, bytes) of what this process has mapped of the table's files; [] where the system does not say."""
        files = {os.path.realpath(file["filename"]) for file in self.rows.cache_files}
        if not files or not Path(MAPS).exists():
            return []
        lines = [line.split(maxsplit=5) for line in Path(MAPS).read_text().splitlines()]
        ranges = [line[0].split("-") for line in lines if len(line) == 6 and line[5] in files]
        return [(int(start, 16), int(end, 16) - int(start, 16)) for start, end in ranges]

    def batches(self) -> "Iterator[pyarrow.RecordBatch]":
        """A table's rows as parts of columns. Files are read and not mapped: pages that are mapped count as memory."""
        import pyarrow

        if not self.whole or not self.rows.cache_files:
            rows = self.rows.with_format(None)
            yield from (rows if rows._indices is None else rows.flatten_indices()).data.to_batches()
            return
        for file in self.rows.cache_files:
            with pyarrow.OSFile(file["filename"]) as source:
                yield from pyarrow.ipc.open_stream(source)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def without_empty(row: Row) -> Row:
    """A row of a table without the fields that have no value.

    >>> without_empty({"text": "Fun.", "label": None})
    {'text': 'Fun.'}
    """
    return {name: value for name, value in row.items() if value is not None}


_held: dict[str, object] = {}


def hold(name: str, rows: object) -> str:
    """Keep rows, or anything else that a run is given from Python, for as long as the process lives.

    Args:
        name: unique in the process.
        rows: a list of dicts or a `datasets.Dataset`; of a reward, the function.
    Returns:
        What stands for it in a configuration.
    """
    _held[name] = rows
    return MEMORY + name


def held(source: str) -> object:
    """What `hold` keeps. Raises UserError if another process kept it."""
    name = source.removeprefix(MEMORY)
    if name not in _held:
        raise UserError(
            f"{source} was given to mezo.train from Python: go on from Python, mezo.resume(RUN) with the same argument"
        )
    return _held[name]


def forget() -> None:
    """Let go of what `open_rows` keeps, so that a file is read once for its columns and its rows."""
    _on_disk.cache_clear()


def open_rows(path: str, split: str) -> Stored:
    """The rows behind --train-file, --dev-file or --test-file.

    Args:
        path: file, folder, hub:OWNER/NAME[:CONFIG][:SPLIT], or memory:NAME.
        split: train, dev or test.
    Raises:
        UserError: it cannot be read.
    """
    if path.startswith(MEMORY):
        return _in_memory(path)
    if path.startswith(HUB):
        return _of_hub(path, split)
    try:
        status = Path(path).stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return _on_disk(path, split, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _on_disk(path: str, split: str, size: int, changed: int) -> Stored:
    """`open_rows` of a file or folder; its size and time of change are there for the cache."""
    if Path(path).is_dir():
        return _of_folder(path, split)
    kind = _format(path)
    if kind == "json" and size <= SMALL:
        return _of_small_json(path)
    if kind == "json":
        return _table(path, _of_large_json(path), whole=True)
    if kind in ("csv", "tsv"):
        return _of_csv(path, "\t" if kind == "tsv" else ",")
    return _table(path, _loaded(path, kind, data_files=path), whole=kind == "parquet")


def _first_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(8)


def _format(path: str) -> str:
    """The format of a file: by its first bytes, else by its name, else JSON lines."""
    first = _first_bytes(path)
    return next((kind for magic, kind in MAGIC.items() if first.startswith(magic)), FORMATS.get(Path(path).suffix)) or (
        "json"
    )


def _of_small_json(path: str) -> Stored:
    """JSON lines, or one list of objects."""
    with open(path, "rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        return _as_table(Stored(path, read_jsonl(path), "line"))
    try:
        values = parse_text(Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        # the first line of a file of lines may begin with a bracket: that message names the line
        if "Extra data" in str(error):
            return Stored(path, read_jsonl(path), "line")
        raise UserError(f"{path} is not JSON ({error}): repair it, a list of objects or one object a line") from None
    if not all(isinstance(value, dict) for value in values):
        odd = next(i for i, value in enumerate(values) if not isinstance(value, dict))
        if len(values) == 1:  # "[1]" is a line that holds no object
            return Stored(path, read_jsonl(path), "line")
        values[odd] = UserError(f"{path} row {odd + 1} must be a JSON object, got {values[odd]!r:.60}")
        values = [value if isinstance(value, dict | UserError) else _no_object(path, i, value)
                  for i, value in enumerate(values)]  # fmt: skip
    return _as_table(_not_empty(Stored(path, values)))


def _of_large_json(path: str) -> "Dataset":
    """JSON as a table. `datasets` would make text of whatever is of another kind than in other rows: not here."""
    from datasets.packaged_modules.json.json import JsonConfig

    known = {option.name for option in fields(JsonConfig)}
    strict = {"on_mixed_types": None} if "on_mixed_types" in known else {}  # older versions know no other way
    try:
        return _loaded(path, "json", data_files=path, **strict)
    except UserError:
        refuse_odd_line(path)
        raise


def _no_object(path: str, number: int, value: object) -> UserError:
    return UserError(f"{path} row {number + 1} must be a JSON object, got {value!r:.60}")


def _of_csv(path: str, separator: str) -> Stored:
    """A table in text, whose values stay as they are written: "NA" is two letters, and 007 is not 7."""
    import datasets
    import pandas

    refuse_binary(path, _first_bytes(path))
    with _as_user_error(path, "CSV"):
        names = pandas.read_csv(path, sep=separator, nrows=0).columns
    text = datasets.Features({name: datasets.Value("string") for name in names})
    reading = {"sep": separator, "features": text, "keep_default_na": False}
    return _table(path, _loaded(path, "csv", data_files=path, **reading), untyped=True, whole=True)


def _of_folder(path: str, split: str) -> Stored:
    """What `save_to_disk` wrote, or data files under a folder."""
    import datasets

    saved = any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))
    with _as_user_error(path, "a folder of data"):
        data = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
    return _table(path, data if isinstance(data, datasets.Dataset) else _split_of(data, path, split))


def _of_hub(path: str, split: str) -> Stored:
    """hub:OWNER/NAME[:CONFIG][:SPLIT]."""
    name, *rest = path.removeprefix(HUB).split(":")
    config, wanted = ([*rest, "", ""])[:2]
    if len(rest) > 2 or not name:
        raise UserError(f"{path}: expected hub:OWNER/NAME, with :CONFIG or :CONFIG:SPLIT or ::SPLIT after it")
    import datasets

    with _as_user_error(path, "a data set of the hub"):
        data = datasets.load_dataset(name, *([config] if config else []), **({"split": wanted} if wanted else {}))
    return _table(path, data if wanted else _split_of(data, path, split))


def _split_of(data: Mapping[str, "Dataset"], path: str, split: str) -> "Dataset":
    """The split of a folder or of the hub; where there is one alone, that."""
    names = [name for name in SPLITS[split] if name in data] or (list(data) if len(data) == 1 else [])
    if not names:
        raise UserError(f"{path} has no split {split!r}, it has {', '.join(data)}: name one, or give a file")
    return data[names[0]]


def _loaded(path: str, builder: str, **arguments: object) -> "Dataset":
    import datasets

    with _as_user_error(path, {"csv": "CSV", "json": "JSON"}.get(builder, builder.capitalize())), _long_batches():
        return datasets.load_dataset(builder, split="train", **arguments)


@contextlib.contextmanager
def _long_batches() -> Iterator[None]:
    """Have `datasets` write batches of many rows: to open a file touches each, and what lies beside it in its pages."""
    import datasets

    before, datasets.config.DEFAULT_MAX_BATCH_SIZE = datasets.config.DEFAULT_MAX_BATCH_SIZE, BATCH
    try:
        yield
    finally:
        datasets.config.DEFAULT_MAX_BATCH_SIZE = before


@contextlib.contextmanager
def _as_user_error(path: str, kind: str) -> Iterator[None]:
    """Whatever `datasets` raises as one line that names the cause; its bars are not shown."""
    import datasets

    shown, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error says it, in a line
    try:
        yield
    except Exception as error:  # libraries below raise what they like: damaged, not found, of mixed types
        while (below := error.__cause__ or error.__context__) is not None:
            error = below
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        remedy = (
            "give local files" if path.startswith(HUB) else "it is damaged, half written or of mixed types: repair it"
        )
        raise UserError(f"{path} cannot be read as {kind} ({reason}): {remedy}") from None
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def _table(path: str, data: "Dataset", untyped: bool = False, whole: bool = False) -> Stored:
    names = {name: tuple(kind.names) for name, kind in data.features.items() if hasattr(kind, "names")}
    return _not_empty(Stored(path, data, classes=names, untyped=untyped, whole=whole))


def _as_table(stored: Stored) -> Stored:
    """Very many short rows as a table, which is what large data is read as; a list where no table holds them."""
    if len(stored.rows) <= LARGE or any(isinstance(row, UserError) for row in stored.rows):
        return stored
    import datasets

    try:
        return Stored(stored.source, datasets.Dataset.from_list(stored.rows), stored.unit)
    except Exception:  # of mixed types: each bad row has a message of its own
        return stored


def _in_memory(path: str) -> Stored:
    rows = held(path)
    if hasattr(rows, "column_names"):
        return _table(path, rows)
    if not isinstance(rows, list | tuple) or not all(isinstance(row, Mapping) for row in rows):
        raise UserError(f"{path} must be a list of dicts or a datasets.Dataset, got {type(rows).__name__}")
    return _as_table(_not_empty(Stored(path, list(map(dict, rows)))))


def _not_empty(stored: Stored) -> Stored:
    if not len(stored.rows):
        raise UserError(f"{stored.source} is empty: give at least one example")
    return stored
