"""Bad data and contradictory options: a one-line error with the remedy."""

import gzip
import json

import pytest
from transformers import PreTrainedTokenizerFast

from mezo.config import Config
from mezo.errors import UserError
from mezo.models.spec import TrainedSpec
from mezo.run.header import make_header
from mezo.tasks import load_splits

WORDS = (" terrible", " great")


def labelled(number, classes=2):
    return [{"text": f"film {i}", "label": i % classes} for i in range(number)]


def sst2_config(**fields):
    return Config.of(model="m", output_dir="o", task="sst2", **fields)


OK = {"text": "a film", "label": 0}
CHOICE = {"prompt": "It was", "options": [" great", " dull"], "answer": 0}
BAD_LABELLED = {
    "empty": ("", {}, r"train\.jsonl is empty"),
    "blank": ("\n\n", {}, r"train\.jsonl is empty"),
    "not_json": ('{"text": "a", "label": 0}\n{text: 1}\n', {}, r"train\.jsonl line 2 is not JSON"),
    "not_object": ("[1]\n", {}, r"line 1 must be a JSON object"),
    "blank_line": ('{"text": "a", "label": 0}\n\n{"text": "a", "label": 0}\n', {}, r"line 2 is blank"),
    "no_label": ([OK, {"text": "a"}], {}, r"line 2 has no field 'label'; it has 'text'"),
    "no_text": ([{"a": "a", "b": 1, "label": 0}], {}, r"line 1 has no field 'text', .*it has 'a', 'b', 'label'"),
    "no_template_field": ([OK], {"prompt": "{title}: {text}"}, r"line 1 has no field 'title'"),
    "text_is_null": ([{"text": None, "label": 0}], {}, r"field 'text' must be a string or a number, got None"),
    "half_surrogate": ('{"text": "a\\ud800", "label": 0}\n', {}, r"half a surrogate pair at character 1"),
    "label_outside": ([OK, {"text": "a", "label": 2}], {}, r"line 2: label .* 2 label words \(0 to 1\), got 2"),
    "label_negative": ([{"text": "a", "label": -1}], {}, r"label must be an index .* got -1"),
    "label_string": ([OK, OK, {"text": "a", "label": "1"}], {}, r"line 3: label must be an index .* got '1'"),
    "label_bool": ([OK, OK, {"text": "a", "label": True}], {}, r"line 3: label must be an index .* got True"),
    "option_merges": ([OK], {"prompt": "{text} gr", "label_words": ("eat", " dull")}, r"a token spans .* 'eat'"),
    "template_brace": ([OK], {"prompt": "{text"}, r"--prompt '\{text' is malformed"),
    "template_index": ([OK], {"prompt": "{0}"}, r"placeholder must be a field name"),
    "template_format": ([OK], {"prompt": "{text:>9}"}, r"placeholder must be a field name"),
    "mask_for_decoder": ([OK], {"prompt": "{text} <mask>"}, r"the model fills no masks"),
    "empty_class": ([OK, OK], {"k_shot": 1}, r"class 1 has 0 examples, k_shot asks for 1"),
    "small_class": (labelled(31), {"k_shot": 16}, r"class 1 has 15 examples, k_shot asks for 16"),
    "too_many": (labelled(5), {"num_train": 6}, r"train has 5 examples, --num-train asks for 6"),
    "no_dev": (labelled(5), {"num_dev": 2}, r"--num-dev is 2, but there is no dev set: give --dev-file"),
    "no_test": (labelled(5), {"num_test": 2}, r"--num-test is 2, but there is no test set"),
    "budget": (
        [OK],
        {"prompt": "{text} It was", "max_length": 4},
        r"line 1: without its text the prompt takes 4 tokens",
    ),
}
BAD_CHOICE = {
    "no_words": ([OK], r"the labels in the column 'label' are numbers: give --label-words"),
    "no_options": ([{"prompt": "a", "answer": 0}], r"has no field 'options'; .* add the possible answers"),
    "options_empty": ([{**CHOICE, "options": []}], r"options must be at least 2, got 0"),
    "one_option": ([{**CHOICE, "options": [" a"]}], r"options must be at least 2, got 1"),
    "options_string": ([{**CHOICE, "options": "ab"}], r"options must be a list of non-empty strings"),
    "option_blank": ([{**CHOICE, "options": ["", " a"]}], r"options must be a list of non-empty strings"),
    "options_equal": ([{**CHOICE, "options": [" a", " a"]}], r"two options are equal"),
    "no_answer": ([{"prompt": "a", "options": [" a", " b"]}], r"has no field 'answer'"),
    "answer_outside": ([{**CHOICE, "answer": 2}], r"answer must be one of the 2 options .* got 2"),
    "answer_unknown": ([{**CHOICE, "answer": "great"}], r"answer must be one of the 2 options .* got 'great'"),
    "too_long": ([{**CHOICE, "prompt": "a film " * 300}], r"takes 603 tokens, --max-length is 512, and only \{text\}"),
}


def refuses(config, tokenizer, message):
    with pytest.raises(UserError, match=message) as error:
        load_splits(config, tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", BAD_LABELLED)
def test_bad_labelled_rows(bpe, make, name):
    rows, fields, message = BAD_LABELLED[name]
    refuses(make(rows, **{"label_words": WORDS, **fields}), bpe, message)


@pytest.mark.parametrize("name", BAD_CHOICE)
def test_bad_choice_rows(bpe, make, name):
    rows, message = BAD_CHOICE[name]
    refuses(make(rows), bpe, message)


def test_k_shot_needs_classes(bpe, make):
    rows = [CHOICE, {**CHOICE, "options": [" a", " film"]}]
    refuses(make(rows, k_shot=1), bpe, r"--k-shot needs the same options in every example of train")


def test_one_option_is_enough_for_the_lm_objective(bpe, make):
    config = make([{**CHOICE, "options": [" great"]}], objective="lm_cross_entropy")
    assert len(load_splits(config, bpe)["train"][0].options) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_words": (" great", "great")}, r"options ' great' and 'great' are the same tokens"),
        ({"label_words": (" great", " awful")}, r"option ' awful' has an unknown token"),
        ({"label_words": (" great", " very dull")}, r"' very dull' must be one token to fill a mask, got 2"),
        ({"prompt": "{text} it was"}, r"has no <mask>, and the model fills masks"),
        ({"prompt": "{text} <mask> <mask>"}, r"must have one mask, got 2"),
    ],
    ids=["equal", "unknown", "two_tokens", "no_mask", "two_masks"],
)
def test_bad_masked_prompts(encoder, make, fields, message):
    refuses(make([OK], **{"prompt": "{text} it was <mask>", "label_words": WORDS, **fields}), encoder, message)


def test_mask_in_the_text_is_refused(encoder, make):
    rows = [{"text": "a [MASK] film", "label": 0}]
    refuses(make(rows, prompt="{text} <mask>", label_words=WORDS), encoder, r"line 1: .* one mask, got 2")


def test_masked_model_without_mask_token(bpe, make):
    with pytest.raises(UserError, match="no mask token"):
        load_splits(make([OK], prompt="{text} <mask>", label_words=WORDS), bpe, masked=True)


def test_equal_options_of_a_decoder(encoder, make):
    config = make([OK], prompt="{text} it was", label_words=(" great", "  great"))
    with pytest.raises(UserError, match="are the same tokens"):
        load_splits(config, encoder, masked=False)


def test_model_limit_is_named(encoder, make):
    short = PreTrainedTokenizerFast(
        tokenizer_object=encoder.backend_tokenizer, mask_token="[MASK]", unk_token="[UNK]", model_max_length=8
    )
    rows = [{"text": "a film " * 5, "label": 0}]
    refuses(
        make(rows, prompt="{text} <mask>", label_words=WORDS), short, r"takes 13 tokens, the model 8: set --max-len"
    )


def test_unreadable_file(bpe, make, tmp_path):
    config = make([OK], label_words=WORDS)
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "\xff"}')
    refuses(config, bpe, r"train\.jsonl is not UTF-8 \(byte 10\)")
    (tmp_path / "train.jsonl").write_bytes(gzip.compress(json.dumps(OK).encode()))
    refuses(config, bpe, r"train\.jsonl is a gzip file, expected JSON lines: unpack it")
    (tmp_path / "train.jsonl").write_bytes(b"PAR1\x15\x04\xff")
    refuses(config, bpe, r"train\.jsonl cannot be read as Parquet \(.*\): it is damaged, half written")
    (tmp_path / "train.jsonl").unlink()
    refuses(config, bpe, r"--train-file: no such file: .*train\.jsonl")


def test_nan_is_a_missing_value(bpe, make):
    refuses(make([OK, {**OK, "text": float("nan")}], label_words=WORDS), bpe, "line 2.*text")


def test_unknown_task_and_wrong_number_of_words(bpe, hub):
    refuses(Config.of(model="m", output_dir="o", task="sst3"), bpe, r"'sst3' is unknown: choose from sst2")
    refuses(sst2_config(label_words=(" a", " b", " c")), bpe, r"has 3 words, task sst2 has 2 classes")


def test_dev_and_train_must_not_overlap(bpe, hub):
    refuses(sst2_config(num_train=80, num_dev=40), bpe, r"ask for 20 examples too many")
    refuses(sst2_config(k_shot=30), bpe, r"class 0 has 50 examples, k_shot asks for 30 for train and as many for dev")
    refuses(sst2_config(num_dev=100), bpe, r"--num-dev 100 takes every training example")


MIXED = "\n".join(
    ['{"text": "a film", "label": 0}', '{"text": "a film", "label": 1}', "{text", '{"text": "a"}']
    + [f'{{"text": "b", "label": {n}}}' for n in range(2, 14)]
)


def test_bad_rows_are_listed_together_with_what_is_wrong_how_often(bpe, make):
    with pytest.raises(UserError) as error:
        load_splits(make(MIXED, label_words=WORDS), bpe)
    head, *shown = str(error.value).split("\n")
    assert "train.jsonl: 14 of 16 rows cannot be used (12 times: label must be an index into the 2 label words" in head
    assert "1 time: is not JSON, 1 time: has no field 'label'" in head
    assert head.endswith("correct them, or leave them out with --skip-bad-rows")
    assert len(shown) == 10
    assert "line 3 is not JSON" in shown[0]
    assert "line 4 has no field 'label'; it has 'text'" in shown[1]


def test_bad_rows_can_be_skipped_and_the_header_counts_them(bpe, make, caplog):
    config = make(MIXED, label_words=WORDS, skip_bad_rows=True)
    with caplog.at_level("INFO"):
        splits = load_splits(config, bpe)
    assert "14 of 16 rows are skipped: 12 times: label must be" in caplog.text
    assert len(splits["train"]) == 2
    spec = TrainedSpec("m", "hash", "float32", {}, {})
    assert make_header(config, spec, splits)["skipped_rows"] == {"train": 14}
    good = make([OK, {**OK, "label": 1}], label_words=WORDS)
    assert "skipped_rows" not in make_header(good, spec, load_splits(good, bpe))
    refuses(make("[1]\n", label_words=WORDS, skip_bad_rows=True), bpe, r"line 1 must be a JSON object")
