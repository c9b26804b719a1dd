"""A training set above the limit is not tokenised ahead, and trains as if it were."""

import json
import re
from pathlib import Path

import pytest

from mezo.api import resume, train
from mezo.config import Config
from mezo.data.files import forget, open_rows
from mezo.data.large import LargeExamples
from mezo.errors import UserError
from mezo.run.header import data_hash
from mezo.run.trajectory import read_header, read_trajectory
from mezo.tasks import load_splits
from tests.data.test_formats import FORMS, NAMED, ROWS, config_of, write
from tests.data.test_trl_formats import BOTH, CHAT, HELLO
from tests.tiny_data import GOOD

WORDS = (" terrible", " great")
FILMS = [{"text": f"the film was {word}", "label": int(word in GOOD)} for word in ("bad", "good", "poor", "fine")] * 5


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def set_large(monkeypatch, limit=5):
    for module in ("files", "load"):
        monkeypatch.setattr(f"mezo.data.{module}.LARGE", limit)
    monkeypatch.setattr("mezo.data.files.SMALL", 1)
    forget()


KINDS = {
    "labels": (ROWS, {"label_words": WORDS, "prompt": "{text} It was"}),
    "names": (NAMED, {"label_words": WORDS}),
    "text": ([{"text": f"a fine film {i}"} for i in range(12)], {}),
    "completion": ([{"prompt": "It was", "completion": f" great {i}"} for i in range(12)], {}),
    "preference": ([{"prompt": "It was", "chosen": f" great {i}", "rejected": " dull"} for i in range(12)], {}),
    "messages": ([{"messages": turns} for turns in (HELLO, BOTH) * 6], {"chat_template": CHAT}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_examples_are_those_that_would_be_held(bpe, tmp_path, kind, monkeypatch):
    rows, fields = KINDS[kind]
    config = config_of(write(tmp_path, rows, "parquet"), **fields)
    expected = load_splits(config, bpe)
    set_large(monkeypatch)
    (tmp_path / "again").mkdir()
    hashes = set()
    for form in ("parquet", "jsonl", "table", *(["csv"] if kind != "messages" else [])):
        splits = load_splits(config_of(write(tmp_path / "again", rows, form), **fields), bpe)
        assert isinstance(splits["train"], LargeExamples)
        assert list(splits["train"]) == expected["train"]
        assert splits["train"].labels.tolist() == [example.label for example in expected["train"]]
        assert data_hash(splits, whole=True) == data_hash(expected)
        hashes.add(data_hash(splits))
    assert len(hashes) == 1
    assert hashes.pop().startswith("rows:")
    other = load_splits(config_of(write(tmp_path / "again", rows[::-1], "jsonl"), **fields), bpe)
    assert data_hash(other) != data_hash(splits)


@pytest.mark.slow  # test_formats.py: texts with labels; above: the examples and the hash of each kind
@pytest.mark.parametrize("large", [False, True], ids=["held", "mapped"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_trains_to_the_same_log_in_each_format(tiny_model, tmp_path, monkeypatch, kind, large):
    if large:
        set_large(monkeypatch)
    rows, fields = KINDS[kind]
    forms = [form for form in FORMS if kind != "messages" or form not in ("csv", "tsv")]
    logs = set()
    for form in forms:
        (tmp_path / f"rows-{form}").mkdir()
        path, run = write(tmp_path / f"rows-{form}", rows, form), tmp_path / f"run-{form}"
        options = {"model": tiny_model, "train_file": path, "output_dir": str(run), "steps": 2, "batch_size": 4}
        train(Config.of(**options, max_length=64, noise=False, report=False, report_to="none", **fields))
        logs.add((run / "trajectory.jsonl").read_bytes())
    assert len(forms) >= 8
    assert len(logs) == 1


MIXED = {
    "list": ({"text": ["a"], "label": 1}, "line 13: field 'text' is a list, in lines before it is text"),
    "name": ({"text": "a", "label": "x"}, "line 13: field 'label' is text, in lines before it is a number"),
    "truth": ({"text": "a", "label": True}, "line 13: field 'label' is true or false, in lines before it is a number"),
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_types_of_a_mapped_file_are_refused_by_line(bpe, tmp_path, monkeypatch, name):
    """`datasets` makes text of a list."""
    set_large(monkeypatch)
    row, message = MIXED[name]
    with pytest.raises(UserError, match=message) as error:
        load_splits(config_of(write(tmp_path, [*ROWS, row, *ROWS], "jsonl"), label_words=WORDS), bpe)
    assert "\n" not in str(error.value)
    path = tmp_path / "train.jsonl"
    path.write_text(path.read_text()[:300])
    with pytest.raises(UserError, match=r"line \d+ is not JSON"):
        load_splits(config_of(str(path), label_words=WORDS), bpe)


def mapped(data):
    """Bytes in memory of what is mapped of a table's files."""
    names = "|".join(re.escape(str(Path(file["filename"]).resolve())) for file in data.cache_files)
    return sum(int(size) for size in re.findall(rf"(?:{names})\n.*\n.*\n.*\nRss: +(\d+) kB", SMAPS.read_text())) << 10


SMAPS = Path("/proc/self/smaps")


@pytest.mark.skipif(not SMAPS.exists(), reason="what is in memory is read as Linux says it")
def test_a_mapped_file_does_not_come_to_lie_in_memory(tmp_path, monkeypatch):
    """To open it touches the head of each batch, a row the pages around it: both must be little of a large file."""
    set_large(monkeypatch)
    path = tmp_path / "train.jsonl"
    path.write_text("".join(f'{{"text": "{i} {"a fine film " * 8}", "label": {i % 2}}}\n' for i in range(100_000)))
    stored = open_rows(str(path), "train")
    assert len(stored.rows.data.to_batches()) < 10, "of a thousand rows they would be a hundred"
    opened, size = mapped(stored.rows), sum(Path(file["filename"]).stat().st_size for file in stored.rows.cache_files)
    assert 0 < opened < size / 4
    for number in range(0, 100_000, 1000):
        assert stored.row(number)["text"].startswith(f"{number} a fine")
    assert mapped(stored.rows) == 0


@pytest.mark.parametrize("fields", [{"num_train": 4}, {"k_shot": 2}, {"num_train": 8, "data_seed": 1}], ids=str)
def test_a_number_takes_the_same_examples(bpe, tmp_path, fields, monkeypatch):
    config = config_of(write(tmp_path, ROWS, "parquet"), label_words=WORDS, **fields)
    expected = load_splits(config, bpe)
    set_large(monkeypatch)
    splits = load_splits(config, bpe)
    assert list(splits["train"]) == expected["train"]
    assert isinstance(splits["train"], LargeExamples) == (fields.get("num_train") == 8)


def test_bad_rows_are_found_by_columns(bpe, tmp_path, monkeypatch):
    set_large(monkeypatch)
    rows = [*ROWS, {"text": None, "label": 1}, {"text": "a", "label": 7}]
    config = config_of(write(tmp_path, rows, "parquet"), label_words=WORDS)
    with pytest.raises(UserError) as error:
        load_splits(config, bpe)
    assert "2 of 14 rows cannot be used" in str(error.value)
    assert "row 13 has no field 'text'" in str(error.value)
    assert "row 14: label must be an index into the 2 label words (0 to 1), got 7" in str(error.value)
    splits = load_splits(config.replace(skip_bad_rows=True), bpe)
    assert (len(splits["train"]), splits.skipped) == (12, {"train": 2})
    chats = config_of(
        write(tmp_path, [{"messages": HELLO}] * 6 + [{"messages": HELLO[:1]}], "jsonl"), chat_template=CHAT
    )
    with pytest.raises(UserError, match="row 7 has no assistant turn"):
        load_splits(chats, bpe)


@pytest.mark.parametrize("layers", [(2,), (0,)], ids=["trunk cache", "whole passes"])
def test_a_run_has_the_log_of_examples_that_are_held_and_resumes(tiny_options, tmp_path, monkeypatch, layers):
    files = {"train_file": write(tmp_path, FILMS, "jsonl"), "test_file": "", "max_length": 64}
    options = {**tiny_options, **files, "steps": 6, "eval_every": 3, "noise": False, "layers_to_transform": layers}
    held, large = str(tmp_path / "held"), str(tmp_path / "large")
    assert train(Config.of(**{**options, "output_dir": held}), until=2) is None
    set_large(monkeypatch)
    train(Config.of(**{**options, "output_dir": large}))
    logs = [read_trajectory(Path(run) / "trajectory.jsonl")[1] for run in (held, large)]
    assert logs[0] == logs[1][:2]
    assert read_header(Path(large) / "trajectory.jsonl")["data_hash"].startswith("rows:")
    resume(held)  # of a program that tokenised all there was
    assert read_trajectory(Path(held) / "trajectory.jsonl")[1] == logs[1]
    changed = [json.loads(line) for line in Path(options["train_file"]).read_text().splitlines()]
    changed[0]["text"] = "the film was nice"
    write(tmp_path, changed, "jsonl")
    with pytest.raises(UserError, match="data_hash of the log and of the model at hand differ"):
        resume(large, machine={"steps": 8})
