"""Training data of millions of rows: mapped from the disk, checked and hashed by columns.

What small data is hashed by, its tokens, would take minutes here. A large split is hashed by the content of its
columns, whatever file they come from, and by all that decides its tokens.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from mezo.data.columns import Reading
from mezo.data.files import Stored
from mezo.data.task import Item
from mezo.errors import UserError

BLOCK = 65_536  # rows that are hashed at a time
ANSWERS = {"completion": ("prompt", "completion"), "preference": ("chosen", "rejected")}
"""Columns that a row must have a value in."""


class Columns:
    """The rows of a large data set as columns.

    Args:
        stored: whose rows are a `datasets.Dataset`.
        reading: of the data.
        template_fields: fields of the prompt.
        words: label words.
    Attributes:
        content: column of each role, such as "text".
        usable: (rows,) bool, whether a row can be used.
        turns: (rows,) examples that a row makes.
        labels: (rows,) the class of each row, 0 where there are no classes.
    """

    def __init__(self, stored: Stored, reading: Reading, template_fields: Sequence[str], words: Sequence[str]):
        self.stored, self.reading, self.words = stored, reading, words
        n = len(stored.rows)
        text = dict(zip(("text", "text_pair"), reading.text, strict=False))
        roles = {"messages": (reading.turns,), **ANSWERS}.get(reading.kind, template_fields)
        self.content = {"messages" if role == reading.turns else role: text.get(role, role) for role in roles}
        needed = list(self.content.values())
        if reading.kind == "preference" and "prompt" in stored.columns:
            self.content["prompt"] = "prompt"
        self.labels, self.turns = np.zeros(n, np.int32), np.ones(n, np.int32)
        self.usable = np.zeros(n, bool)
        label = [reading.label] if reading.kind == "labelled" else []
        if not {*self.content.values(), *label} <= set(stored.columns):
            return
        start = 0
        for batch in stored.batches():
            rows, start = slice(start, start + len(batch)), start + len(batch)
            usable = np.ones(len(batch), bool)
            for name in needed:
                column = batch.column(name)
                odd = pa.types.is_nested(column.type) or pa.types.is_boolean(column.type)
                usable &= pc.is_valid(column).to_numpy(False) & (reading.kind != "labelled" or not odd)
            if reading.kind == "labelled":
                self.labels[rows] = self._numbers(batch.column(reading.label))
                usable &= self.labels[rows] >= 0
            if reading.kind == "messages":
                self.turns[rows], begins = _turns(batch.column(reading.turns))
                usable &= (self.turns[rows] > 0) & ~begins
            self.usable[rows] = usable

    def _numbers(self, column: pa.Array) -> np.ndarray:
        """The class of each label, -1 where it is none."""
        values = column.unique()
        numbers = np.full(len(values) + 1, -1, np.int32)
        for at, value in enumerate(values.to_pylist()):
            with contextlib.suppress(UserError):  # the row itself will say so
                number = -1 if value is None else self.reading.labels.number(value, "")
                numbers[at] = number if 0 <= number < len(self.words) else -1
        return numbers[pc.fill_null(pc.index_in(column, value_set=values), len(values)).to_numpy(False)]

    def places(self, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row, turn) of every example of some rows."""
        turns, kept = self.turns[kept], kept.astype(np.int32)
        if (turns == 1).all():
            return kept, np.broadcast_to(np.int32(0), kept.shape)
        rows = np.repeat(kept, turns)
        starts = np.repeat(np.cumsum(turns) - turns, turns)
        return rows, (np.arange(len(rows)) - starts).astype(np.int32)

    def among(self, rows: np.ndarray) -> np.ndarray:
        """The rows that occur, each once and in order; to sort millions would take seconds, and their size again."""
        found = np.zeros(len(self.usable), bool)
        found[rows] = True
        return np.flatnonzero(found)

    def hash(self, kept: np.ndarray, decides: Mapping[str, object]) -> str:
        """SHA-256 of the content of the columns, and of what else decides the tokens; the same in every file format."""
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
        digest.update(hashed(kept).encode())
        digest.update(hashed(self.labels[kept]).encode())
        content = Digests()
        for batch in self.stored.batches():
            for role, column in self.content.items():
                content.add(role, batch.column(column))
        digest.update(content.hexdigest().encode())
        return digest.hexdigest()


def _turns(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """How many turns the assistant has in each conversation, and whether it begins."""
    field = next(iter({"role", "from"} & {field.name for field in column.type.value_type}))
    said = pc.is_in(pc.struct_field(column.flatten(), field), value_set=pa.array(["assistant", "gpt"])).to_numpy(False)
    ends = np.cumsum(pc.fill_null(pc.list_value_length(column), 0).to_numpy(False))
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    totals = np.concatenate([[0], np.cumsum(said)])
    return totals[ends] - totals[starts], np.append(said, False)[starts] & (ends > starts)


class Digests:
    """Hashes of the parts of columns: which values there are, their lengths and texts, of lists and structures too."""

    def __init__(self):
        self.parts: dict[str, hashlib._Hash] = {}

    def _update(self, name: str, content: bytes | memoryview) -> None:
        self.parts.setdefault(name, hashlib.sha256()).update(content)

    def add(self, path: str, values: pa.Array) -> None:
        """Add some values of the column at a path."""
        self._update(f"{path}?", pc.is_valid(values).to_numpy(False).tobytes())
        if isinstance(values, pa.ListArray | pa.LargeListArray):
            lengths = pc.fill_null(pc.list_value_length(values), 0)
            self._update(f"{path}#", lengths.cast(pa.int64()).to_numpy(False).tobytes())
            self.add(f"{path}[]", values.flatten())
        elif isinstance(values, pa.StructArray):
            for field in values.type:
                self.add(f"{path}.{field.name}", pc.struct_field(values, field.name))
        elif len(values):
            text = pc.fill_null(values.cast(pa.large_string()), "")
            self._update(f"{path}#", pc.binary_length(text).to_numpy(False).astype(np.int64).tobytes())
            offsets = np.frombuffer(text.buffers()[1], np.int64)[text.offset : text.offset + len(text) + 1]
            if text.buffers()[2] is not None:
                self._update(path, memoryview(text.buffers()[2])[offsets[0] : offsets[-1]])

    def hexdigest(self) -> str:
        """Of all parts."""
        return hashlib.sha256(
            json.dumps({name: part.hexdigest() for name, part in self.parts.items()}, sort_keys=True).encode()
        ).hexdigest()


def hashed(numbers: np.ndarray) -> str:
    """SHA-256 of whole numbers."""
    digest = hashlib.sha256()
    for start in range(0, len(numbers), BLOCK):
        digest.update(numbers[start : start + BLOCK].astype(np.int64).tobytes())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what a tokenizer does to text."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    known = json.loads(core.to_str()) if core is not None else {"name": tokenizer.name_or_path}
    known = {name: value for name, value in known.items() if name not in ("truncation", "padding")}
    known["special"] = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


class LightItems(Sequence[Item]):
    """What sampling asks of items, which are not made: their classes.

    Args:
        labels: the class of each.
        words: label words; () where there are no classes.
    """

    def __init__(self, labels: np.ndarray, words: Sequence[str]):
        self.labels = labels
        self.kinds = [Item({}, tuple(words), label, "") for label in range(max(1, len(words)))]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Item:
        return self.kinds[self.labels[i]]

    def __iter__(self) -> Iterator[Item]:
        return map(self.kinds.__getitem__, self.labels.tolist())
