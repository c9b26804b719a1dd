"""Every format of a file, name of a column and kind of label gives the examples, the hash and the log of JSON lines."""

import json
from pathlib import Path

import datasets
import pytest

from mezo.api import train
from mezo.config import Config
from mezo.data.files import hold
from mezo.errors import UserError
from mezo.run.header import data_hash
from mezo.run.trajectory import read_header
from mezo.tasks import load_splits
from tests.tiny_models import tokenizer

WORDS = (" terrible", " great")
ROWS = [{"text": f"{'a fine' if i % 2 else 'a dull'} film, {i}", "label": i % 2} for i in range(12)]
NAMED = [{"review": row["text"], "sentiment": ("negative", "positive")[row["label"]]} for row in ROWS]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, rows, form):
    """The rows as a file, or folder, of a format; its path."""
    path = path / f"train.{form}"
    if form in ("jsonl", "json"):
        path.write_text(json.dumps(rows, indent=1) if form == "json" else "".join(json.dumps(r) + "\n" for r in rows))
        return str(path)
    data = datasets.Dataset.from_list(rows)
    if form in ("csv", "tsv"):
        data.to_csv(path, sep="\t" if form == "tsv" else ",", index=False)
    elif form == "parquet":
        data.to_parquet(path)
    elif form == "arrow":
        data.save_to_disk(path.with_suffix(".saved"))
        (file,) = path.with_suffix(".saved").glob("*.arrow")
        path.write_bytes(file.read_bytes())
    elif form == "folder":
        path.mkdir()
        data.to_parquet(path / "train.parquet")
        data.select([0]).to_parquet(path / "test.parquet")
    elif form == "saved":
        data.save_to_disk(path)
    elif form == "memory":
        return hold(str(path), rows)
    elif form == "table":
        return hold(str(path), data)
    return str(path)


FORMS = ("jsonl", "json", "csv", "tsv", "parquet", "arrow", "folder", "saved", "memory", "table")


def config_of(path, **fields):
    return Config.of(**{"model": "m", "output_dir": "o", "train_file": path, **fields})


@pytest.mark.parametrize("form", FORMS[1:])
def test_each_format_gives_the_examples_of_json_lines(bpe, tmp_path, form):
    fields = {"prompt": "{text} It was", "label_words": WORDS}
    expected = load_splits(config_of(write(tmp_path, ROWS, "jsonl"), **fields), bpe)
    splits = load_splits(config_of(write(tmp_path, ROWS, form), **fields), bpe)
    assert splits == expected
    assert data_hash(splits) == data_hash(expected)


def test_the_hash_of_json_lines_is_what_it_ever_was(bpe, tmp_path):
    """Written down from the program that read JSON lines alone: runs of it are resumed."""
    splits = load_splits(config_of(write(tmp_path, ROWS, "jsonl"), prompt="{text} It was", label_words=WORDS), bpe)
    assert data_hash(splits) == HASH


HASH = "1ebb68446ccf8659b03960e3765d3e8974b6ecea29a845893d5df706ac4933f8"


@pytest.fixture(scope="module")
def log_of_lines():
    return {}


@pytest.mark.parametrize("form", FORMS[1:])
def test_each_format_trains_to_the_same_log(tiny_options, tmp_path, form, log_of_lines):
    def run(form):
        out = str(tmp_path / f"run-{form}")
        train(Config.of(**{**options, "train_file": write(tmp_path, rows, form), "output_dir": out}))
        log = (Path(out) / "trajectory.jsonl").read_bytes()
        return log, read_header(Path(out) / "trajectory.jsonl")["data_hash"]

    rows = [{"text": f"the film was {word}", "label": i % 2} for i, word in enumerate(("bad", "good", "poor", "fine"))]
    options = {**tiny_options, "dev_file": "", "test_file": "", "steps": 3, "batch_size": 4, "noise": False}
    if not log_of_lines:
        log_of_lines["jsonl"] = run("jsonl")
    assert run(form) == log_of_lines["jsonl"]


@pytest.mark.parametrize("form", FORMS)
def test_columns_and_names_are_found_and_said(bpe, tmp_path, form, caplog):
    expected = load_splits(config_of(write(tmp_path, ROWS, "jsonl"), label_words=WORDS), bpe)
    (tmp_path / "named").mkdir()
    with caplog.at_level("INFO", "mezo"):
        splits = load_splits(config_of(write(tmp_path / "named", NAMED, form), label_words=WORDS), bpe)
    assert splits == expected
    said = "text from 'review', label from 'sentiment' (negative -> ' terrible', positive -> ' great'); examples: 12 of"
    assert sum(said in message for message in caplog.messages) == 1


LABELS = {
    "names of the words": (["great", "terrible"], WORDS, [1, 0], "great -> ' great', terrible -> ' terrible'"),
    "names by order": (["b", "a"], WORDS, [1, 0], "a -> ' terrible', b -> ' great'"),
    "truth": ([True, False], WORDS, [1, 0], "false -> ' terrible', true -> ' great'"),
    "names alone": (["good", "bad"], (), [1, 0], "bad -> ' bad', good -> ' good'"),
    "whole numbers with a point": ([1.0, 0.0], WORDS, [1, 0], "0 -> ' terrible', 1 -> ' great'"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_of_each_kind(bpe, tmp_path, name, caplog):
    labels, words, expected, said = LABELS[name]
    rows = [{"sentence": "a film", "class": label} for label in labels]
    for form in ("jsonl", "parquet"):
        with caplog.at_level("INFO", "mezo"):
            examples = load_splits(config_of(write(tmp_path, rows, form), label_words=words), bpe)["train"]
        assert [example.label for example in examples] == expected
        assert said in caplog.messages[-1]


@pytest.mark.parametrize(("words", "expected"), [(WORDS, [1, 0]), ((" pos", " neg"), [0, 1]), ((), [1, 0])])
def test_class_labels_go_by_name_or_order(bpe, tmp_path, words, expected):
    data = datasets.Dataset.from_list([{"text": "a film", "label": label} for label in (1, 0)])
    data = data.cast_column("label", datasets.ClassLabel(names=["neg", "pos"]))
    data.to_parquet(tmp_path / "train.parquet")
    examples = load_splits(config_of(str(tmp_path / "train.parquet"), label_words=words), bpe)["train"]
    assert [example.label for example in examples] == expected


def test_pairs_have_two_columns(bpe, tmp_path):
    rows = [
        {"premise": "a film", "hypothesis": "a fine film", "label": 1},
        {"premise": "b", "hypothesis": "c", "label": 0},
    ]
    first, _ = load_splits(config_of(write(tmp_path, rows, "csv"), label_words=WORDS), bpe)["train"]
    assert bpe.decode(first.prompt[1:]) == "a film\na fine film"
    chosen = config_of(
        write(tmp_path, rows, "parquet"), label_words=WORDS, text_column=("hypothesis", "premise"),
        prompt="{text} or {text_pair}?", label_column="label",
    )  # fmt: skip
    assert bpe.decode(load_splits(chosen, bpe)["train"][0].prompt[1:]) == "a fine film or a film?"


def test_text_of_csv_stays_as_it_is_written(bpe, tmp_path):
    (tmp_path / "train.csv").write_text('text,label\nNA,0\n007,1\n"two\nlines, and ""quotes""",1\n')
    examples = load_splits(config_of(str(tmp_path / "train.csv"), label_words=WORDS), bpe)["train"]
    assert [bpe.decode(e.prompt[1:]) for e in examples] == ["NA", "007", 'two\nlines, and "quotes"']


def test_splits_of_a_folder_are_found_by_name(bpe, tmp_path):
    folder = write(tmp_path, ROWS, "folder")
    splits = load_splits(config_of(folder, test_file=folder, label_words=WORDS), bpe)
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 12, "test": 1}
    with pytest.raises(UserError, match=r"train\.folder has no split 'dev', it has train, test: name one"):
        load_splits(config_of(folder, dev_file=folder, label_words=WORDS), bpe)


def test_a_data_set_of_the_hub(bpe, monkeypatch):
    asked = []

    def load_dataset(name, *config, split=None):
        asked.append((name, *config, split))
        data = datasets.Dataset.from_list(ROWS)
        return data if split else datasets.DatasetDict({"train": data, "validation": data.select([0, 1])})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    files = {"dev_file": "hub:me/films", "test_file": "hub:me/films:plain:validation"}
    splits = load_splits(config_of("hub:me/films:plain", label_words=WORDS, **files), bpe)
    assert [len(examples) for examples in splits.values()] == [12, 2, 12]
    assert set(asked) == {
        ("me/films", "plain", None), ("me/films", None), ("me/films", "plain", "validation"),
    }  # fmt: skip
    with pytest.raises(UserError, match="expected hub:OWNER/NAME"):
        load_splits(config_of("hub:me/films:a:b:c", label_words=WORDS), bpe)


BAD = {
    "no such text column": ("csv", ROWS, {"text_column": ("txt",)}, r"-column txt: .*no such column, it has 'te"),
    "no such label column": ("parquet", ROWS, {"label_column": "y"}, r"-column y: .*no such column, it has 'text'"),
    "no label": ("csv", [{"text": "a"}], {}, r"no column for the label, it has 'text': name it with --label-column"),
    "label outside": (
        "csv", [*NAMED, {"review": "a", "sentiment": "mixed"}], {"label_words": (" negative", " positive")},
        r"train\.csv row 13: label must be one of 'negative', 'positive', got 'mixed'",
    ),
    "too many names": (
        "json", [*NAMED, {"review": "a", "sentiment": "x"}], {}, r"has 3 labels \('negative', .*, --label-words has 2",
    ),
    "number outside": ("parquet", [*ROWS, {"text": "a", "label": 2}], {}, r"row 13: label must be an index .* got 2"),
    "three columns": ("csv", ROWS, {"text_column": ("text",) * 3}, r"--text-column takes one column or two, got 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_one_line(bpe, tmp_path, name):
    form, rows, fields, message = BAD[name]
    with pytest.raises(UserError, match=message) as error:
        load_splits(config_of(write(tmp_path, rows, form), **{"label_words": WORDS, **fields}), bpe)
    assert "\n" not in str(error.value)


DAMAGED = {
    "half a parquet": ("parquet", lambda content: content[: len(content) // 2], "cannot be read as Parquet"),
    "half an arrow": ("arrow", lambda content: content[:40], "cannot be read as Arrow"),
    "half a list": ("json", lambda content: content[: len(content) // 2], r"train\.json is not JSON"),
    "a list with a number": ("json", lambda content: b'[{"text": "a", "label": 0}, 7]', "row 2 must be a JSON object"),
    "nothing": ("csv", lambda content: b"text,label\n", r"train\.csv is empty|cannot be read as CSV"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_one_line_and_nothing_is_written(tiny_options, tmp_path, name, capfd, as_flags):
    from mezo.cli.main import main

    form, damage, message = DAMAGED[name]
    path = Path(write(tmp_path, ROWS, form))
    path.write_bytes(damage(path.read_bytes()))
    options = {**tiny_options, "train_file": str(path), "dev_file": "", "test_file": ""}
    assert main(["train", *as_flags(options)]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mezo: error: ")
    with pytest.raises(UserError, match=message):
        load_splits(Config.of(**options), tokenizer())
    assert not Path(options["output_dir"]).exists()


CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}[assistant]{% endif %}"
ASKED = {"messages": [{"role": "user", "content": "a film"}]}
TALK = {"messages": [*ASKED["messages"], {"role": "assistant", "content": "great"}]}
MIXED = [{"text": "a", "label": 0}, {"text": ["a", "b"], "label": 1}]
REFUSED = {
    "a column that is not there": ("csv", ROWS, {"text_column": ("txt",)}, "no such column, it has 'text', 'label'"),
    "a label outside the mapping": ("csv", [*ROWS, {"text": "a", "label": 2}], {}, "row 13: label must be an index"),
    "mixed types": ("jsonl", MIXED, {}, "line 2: field 'text' must be a string or a number"),
    "no chat template": ("jsonl", [TALK] * 4, {"prompt": ""}, "has no chat template: give --chat-template FILE.jinja"),
    "no assistant turn": (
        "jsonl",
        [TALK, ASKED],
        {"prompt": "", "chat_template": CHAT},
        "line 2 has no assistant turn",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_command_ends_with_one_line_and_code_2_and_writes_nothing(tiny_options, tmp_path, name, capfd, as_flags):
    """A parquet that is half written is above."""
    from mezo.cli.main import main

    form, rows, fields, message = REFUSED[name]
    options = {**tiny_options, "train_file": write(tmp_path, rows, form), **fields}
    for unused in ("dev_file", "test_file", *(("label_words", "prompt") if "prompt" in fields else ())):
        options.pop(unused)
    before = set(tmp_path.iterdir())
    assert main(["train", *as_flags(options)]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("mezo: error: ")]
    assert len(said) == 1
    assert message in said[0]
    assert {path for path in tmp_path.iterdir() if path.name != "cache"} <= before


def test_files_beside_a_task_have_its_fields(bpe, hub, tmp_path):
    path = write(tmp_path, hub["validation"], "json")
    config = Config.of(model="m", output_dir="o", task="sst2", train_file=path, num_dev=0)
    assert len(load_splits(config, bpe)["train"]) == 9
    with pytest.raises(UserError, match="--text-column: beside --task files have the fields of the task"):
        load_splits(config.replace(text_column=("sentence",)), bpe)


@pytest.mark.parametrize("truncation", ["right", "left", "refuse"])
def test_which_end_is_cut(bpe, tmp_path, truncation):
    rows = [{"text": "film a fine film", "label": 0}, {"text": "a", "label": 1}]
    config = config_of(
        write(tmp_path, rows, "jsonl"), label_words=WORDS, prompt="{text} It was", max_length=7, truncation=truncation
    )
    if truncation == "refuse":
        with pytest.raises(UserError, match=r"line 1 takes \d+ tokens, .*--truncation refuse cuts none"):
            load_splits(config, bpe)
        return
    first, _ = load_splits(config, bpe)["train"]
    kept = bpe.decode(first.prompt[1:]).removesuffix(" It was")
    whole = rows[0]["text"]
    assert kept
    assert kept != whole
    assert whole.startswith(kept) if truncation == "right" else whole.endswith(kept)
