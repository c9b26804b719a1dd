"""From files and hub rows to token ids."""

import re
import time

import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from mezo import tasks
from mezo.config import Config
from mezo.data.example import Example
from mezo.data.sampling import shuffled_classes
from mezo.data.template import Template
from mezo.errors import UserError
from mezo.tasks import Prompt, Task, load_splits, register

WORDS = (" terrible", " great")


def labelled(number, classes=2):
    return [{"text": f"film {i}", "label": i % classes} for i in range(number)]


def texts(examples, tokenizer):
    return [tokenizer.decode(example.prompt[1:]) for example in examples]


# What is tokenised


def test_text_and_label(bpe, make):
    config = make([{"text": "a fine film", "label": 1}], prompt="{text} It was", label_words=WORDS)
    splits = load_splits(config, bpe)
    assert list(splits) == ["train"]
    prompt = tuple(bpe("a fine film It was")["input_ids"])
    options = tuple(tuple(bpe(word, add_special_tokens=False)["input_ids"]) for word in WORDS)
    assert splits["train"] == [Example(prompt, options, 1)]
    assert prompt[0] == bpe.bos_token_id


def test_prompt_options_answer(bpe, make):
    rows = [
        {"prompt": "It was", "options": [" great", " terrible", " a dull film"], "answer": 2},
        {"prompt": "a fine film It was", "options": [" terrible", " great"], "answer": " great"},
    ]
    examples = load_splits(make(rows), bpe)["train"]
    assert [example.label for example in examples] == [2, 1]
    assert [len(example.options) for example in examples] == [3, 2]
    for row, example in zip(rows, examples, strict=True):
        for text, option in zip(row["options"], example.options, strict=True):
            assert bpe.decode(example.prompt[1:] + option) == row["prompt"] + text


def test_template_takes_any_field(bpe, make):
    rows = [{"premise": "a film", "year": 1999, "label": 0}]
    config = make(rows, prompt="{premise} ({year}) {{x}}:\\n", label_words=WORDS)
    assert texts(load_splits(config, bpe)["train"], bpe) == ["a film (1999) {x}:\n"]


def test_special_tokens_after_the_prompt_are_left_out(bpe, make):
    copy = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe.backend_tokenizer.to_str()))
    copy.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    config = make(labelled(4), prompt="{text} It was", label_words=WORDS)
    assert load_splits(config, copy) == load_splits(config, bpe)


def test_masked_prompt(encoder, make):
    config = make([{"text": "a fine film", "label": 1}], prompt="{text} it was <mask> .", label_words=WORDS)
    (example,) = load_splits(config, encoder)["train"]
    assert encoder.decode(example.prompt) == "[CLS] a fine film it was [MASK] . [SEP]"
    assert example.prompt[example.mask] == encoder.mask_token_id
    assert example.options == ((encoder.convert_tokens_to_ids("terrible"),), (encoder.convert_tokens_to_ids("great"),))


def test_a_decoder_may_have_a_mask_token(encoder, make):
    config = make(labelled(2), prompt="{text} it was", label_words=WORDS)
    (example, _) = load_splits(config, encoder, masked=False)["train"]
    assert example.mask is None
    assert example.prompt[-1] == encoder.convert_tokens_to_ids("was")  # no [SEP] before the option


def test_crlf_and_byte_order_mark_and_unicode_line_separators(bpe, make):
    rows = '\ufeff{"text": "a\u2028film", "label": 0}\r\n{"text": "dull", "label": 1}\r\n\r\n'
    assert texts(load_splits(make(rows, label_words=WORDS), bpe)["train"], bpe) == ["a\u2028film", "dull"]


# The token budget


@pytest.mark.parametrize("max_length", range(9, 20))
def test_only_the_text_is_cut_and_from_its_end(bpe, make, max_length):
    long = "a fine film a dull film a fine film a dull film"
    rows = [{"text": long, "label": 0}, {"text": "a film", "label": 1}]
    config = make(rows, prompt="film: {text} It was", label_words=(" terrible", " a fine film"), max_length=max_length)
    examples = load_splits(config, bpe)["train"]
    first, _ = texts(examples, bpe)
    match = re.fullmatch(r"film: (.*) It was", first)
    assert long.startswith(match[1])
    longest = max(len(example.prompt) + len(option) for example in examples for option in example.options)
    assert longest <= max_length
    # One token is one word here: nothing is cut that could have stayed.
    assert len(match[1].split()) == min(max_length - 8, len(long.split()))


def test_cut_inside_a_character_of_several_tokens(bpe, make):
    rows = [{"text": "🙂🙂🙂🙂", "label": 0}]  # four bytes and as many tokens each
    config = make(rows, prompt="{text} It was", label_words=WORDS, max_length=1 + 4 + 3 + 2 + 1)
    assert texts(load_splits(config, bpe)["train"], bpe) == ["🙂 It was"]


def test_other_fields_are_never_cut(bpe, make):
    rows = [{"title": "a fine film", "text": "dull " * 30, "label": 0}]
    config = make(rows, prompt="{text}({title})", label_words=WORDS, max_length=16)
    (text,) = texts(load_splits(config, bpe)["train"], bpe)
    assert re.fullmatch(r"(dull )*dull\(a fine film\)", text)


def test_masked_text_is_cut_around_its_mask(encoder, make):
    rows = [{"text": "fine film " * 9, "label": 0}]
    config = make(rows, prompt="{text} it was <mask> .", label_words=WORDS, max_length=9)
    (example,) = load_splits(config, encoder)["train"]
    assert encoder.decode(example.prompt) == "[CLS] fine film fine it was [MASK] . [SEP]"
    assert example.prompt.index(encoder.mask_token_id) == example.mask == 6


# Which examples are kept


def test_k_shot_is_stratified_and_ordered(bpe, make):
    rows = [{"text": f"film {i}", "label": int(i % 5 == 0)} for i in range(60)]
    splits = load_splits(make(rows, dev=rows, test=rows, label_words=WORDS, k_shot=4), bpe)
    assert [len(splits[name]) for name in ("train", "dev", "test")] == [8, 8, 60]
    for name in ("train", "dev"):
        assert sorted(example.label for example in splits[name]) == [0] * 4 + [1] * 4
        numbers = [int(text.split()[1]) for text in texts(splits[name], bpe)]
        assert numbers == sorted(numbers)
    assert splits["train"] != splits["dev"]  # of one file, another choice for each split


def test_numbers_are_balanced_and_depend_on_data_seed_alone(bpe, make):
    rows = labelled(50)
    config = make(rows, dev=rows, label_words=WORDS, num_train=10, num_dev=7)
    first = load_splits(config, bpe)
    assert sum(example.label for example in first["train"]) == 5
    assert sorted(example.label for example in first["dev"]) == [0] * 3 + [1] * 4
    assert load_splits(config.replace(seed=9, lr=1e-6), bpe) == first
    assert load_splits(config.replace(data_seed=1), bpe)["train"] != first["train"]
    larger = load_splits(config.replace(num_train=12), bpe)
    assert set(texts(first["train"], bpe)) < set(texts(larger["train"], bpe))
    assert larger["dev"] == first["dev"]


def test_without_balance_a_number_is_a_random_sample(bpe, make):
    """Its classes are as many as chance has it: of 40 from 900 and 100, four or so are of the rare one."""
    rows = [{"text": f"film {i}", "label": int(i % 10 == 0)} for i in range(1000)]
    config = make(rows, test=rows, label_words=WORDS, num_train=40, num_test=400, balance="off")
    splits = load_splits(config, bpe)
    assert (len(splits["train"]), len(splits["test"])) == (40, 400)
    assert 20 < sum(example.label for example in splits["test"]) < 60
    balanced = load_splits(config.replace(balance="on"), bpe)
    assert sum(example.label for example in balanced["test"]) == 100, "all there are"
    larger = load_splits(config.replace(num_train=50), bpe)
    assert set(texts(splits["train"], bpe)) < set(texts(larger["train"], bpe))


def test_sampling_never_changes():
    # sha256("7/train/0"), ...: recorded once; a change would silently give every run other data.
    expected = {0: [4, 8, 0, 6, 2], 1: [1, 3, 7, 5, 9]}
    assert shuffled_classes([0, 1] * 5, 2, seed=7, split="train") == expected
    assert shuffled_classes([0, 1] * 5, 2, seed=8, split="train") != expected
    assert shuffled_classes([0, 1] * 5, 2, seed=7, split="dev") != expected


def test_all_are_kept_in_file_order(bpe, make):
    assert texts(load_splits(make(labelled(5), label_words=WORDS), bpe)["train"], bpe) == [
        f"film {i}" for i in range(5)
    ]


def test_options_of_their_own_are_sampled_without_classes(bpe, make):
    rows = [{"prompt": "It was", "options": [f" film {i}", " dull"], "answer": 0} for i in range(9)]
    assert len(load_splits(make(rows, num_train=4), bpe)["train"]) == 4


# Built-in tasks


def sst2_config(**fields):
    return Config.of(model="m", output_dir="o", task="sst2", **fields)


def test_sst2(hub, bpe):
    splits = load_splits(sst2_config(), bpe)
    assert {name: len(examples) for name, examples in splits.items()} == {"train": 90, "test": 10, "dev": 10}
    assert texts(splits["test"][:1], bpe) == ["a dull film 0 It was"]
    assert splits["test"][0].label == 1
    assert len(set(texts(splits["train"] + splits["dev"], bpe))) == 100


@pytest.mark.parametrize(
    ("fields", "train", "dev"),
    [
        ({"k_shot": 16}, 32, 32),
        ({"num_train": 20}, 20, 10),
        ({"num_dev": 30}, 70, 30),
        ({"k_shot": 8, "num_dev": 50}, 16, 50),
    ],
    ids=["k_shot", "num_train", "num_dev", "both"],
)
def test_dev_is_cut_from_train(hub, bpe, fields, train, dev):
    splits = load_splits(sst2_config(**fields), bpe)
    assert (len(splits["train"]), len(splits["dev"])) == (train, dev)
    assert not set(texts(splits["train"], bpe)) & set(texts(splits["dev"], bpe))
    assert abs(2 * sum(example.label for example in splits["dev"]) - dev) <= 1


def test_no_network_says_to_use_files(monkeypatch, bpe):
    def offline(name):
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub\nsecond line")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(UserError, match=r"sst2 cannot be loaded .*beside --task, --train-file train\.jsonl") as error:
        load_splits(sst2_config(), bpe)
    assert "\n" not in str(error.value)


def test_hub_rows_also_work_from_a_file(bpe, make, hub):
    config = make(hub["validation"], prompt="{sentence}It was", label_words=WORDS)
    assert load_splits(config, bpe)["train"] == load_splits(sst2_config(), bpe)["test"]


def test_a_task_of_your_own(monkeypatch, bpe):
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    rows = [{"premise": "a dull film", "options": [" great", " terrible"], "answer": 1}]
    register(Task("mine", lambda: {"train": rows}, Prompt("{premise} so it was"), dev_size=0))
    (example,) = load_splits(Config.of(model="m", output_dir="o", task="mine"), bpe)["train"]
    assert bpe.decode(example.prompt[1:] + example.options[1]) == "a dull film so it was terrible"
    with pytest.raises(ValueError, match="'mine' exists"):
        register(Task("mine", lambda: {}))


def test_template_with_the_text_field_twice():
    template = Template.parse("{text} - {text}", "text")
    assert template.fields == ("text",)
    assert template.cut_span({"text": "abc"}) == (0, 3)


def test_thousands_of_examples_in_seconds(bpe, make):
    config = make([{"text": "a fine film " * 8, "label": i % 2} for i in range(1500)], label_words=WORDS)
    started = time.process_time()
    load_splits(config, bpe)
    assert time.process_time() - started < 6
