"""In-context learning: what stands in front of a tested prompt, what is left out, and that nothing is cut for it."""

import pytest

from mezo.data.demonstrations import draw_demonstrations
from mezo.data.task import Item
from mezo.errors import UserError
from mezo.tasks import load_splits
from tests.tasks.hub_rows import ROWS

WORDS = (" terrible", " great")
TRAIN = [{"text": f"film {i}", "label": i % 2} for i in range(20)]
TEST = [{"text": "a fine film", "label": 1}, {"text": "a dull film", "label": 0}]


def text(example, tokenizer):
    return tokenizer.decode(example.prompt[1:]).removesuffix("</s>")


def parts(example, tokenizer):
    """The demonstrations of a prompt, and the tested prompt itself."""
    *before, own = text(example, tokenizer).split("\n\n")
    return before, own


def test_right_answers_in_front_of_each_tested_prompt(bpe, make):
    config = make(TRAIN, test=TEST, prompt="{text} It was", label_words=WORDS, num_demonstrations=4)
    splits = load_splits(config, bpe)
    assert list(splits) == ["test"]
    before, own = parts(splits["test"][0], bpe)
    assert own == "a fine film It was"
    assert parts(splits["test"][1], bpe) == (before, "a dull film It was")
    shown = [(int(demo.split()[1]), demo.split()[-1]) for demo in before]
    assert all(word == ("terrible", "great")[number % 2] for number, word in shown)
    assert [word for _, word in shown].count("great") == 2
    assert len(set(shown)) == 4
    plain = load_splits(config.replace(num_demonstrations=0), bpe)["test"]
    assert [e.options for e in splits["test"]] == [e.options for e in plain]
    assert [e.label for e in splits["test"]] == [1, 0]


def test_a_masked_models_demonstrations_have_their_answer_in_the_masks_place(roberta, make):
    config = make([ROWS["snli"]] * 3, test=[ROWS["snli"]], task="snli", num_demonstrations=2)
    (example,) = load_splits(config, roberta)["test"]
    assert text(example, roberta) == (
        "Two dogs run? No, the dogs sleep.\n\nTwo dogs run? No, the dogs sleep.\n\nTwo dogs run?<mask>, the dogs sleep."
    )
    assert example.prompt[example.mask] == roberta.mask_token_id


def test_answers_of_several_tokens(bpe, make):
    config = make([ROWS["squad"]], test=[ROWS["squad"]], task="squad", num_demonstrations=1)
    (example,) = load_splits(config, bpe)["test"]
    own = "Title: Ice_and_snow\nContext: Ice is cold. Snow is white.\nQuestion: What is cold?\nAnswer:"
    assert text(example, bpe) == f"{own} Ice\n\n{own}"


def test_drawn_by_data_seed_and_from_the_kept_training_examples(bpe, make):
    config = make(TRAIN, test=TEST, prompt="{text} It was", label_words=WORDS, num_demonstrations=4, num_train=6)
    kept = {text(e, bpe) for e in load_splits(config.replace(num_demonstrations=0), bpe)["train"]}
    first = load_splits(config, bpe)["test"]
    before, _ = parts(first[0], bpe)
    assert {demo.rpartition(" ")[0] for demo in before} <= kept
    assert load_splits(config, bpe)["test"] == first
    others = [load_splits(config.replace(data_seed=seed), bpe)["test"] for seed in range(1, 6)]
    assert any(other != first for other in others)


def test_classes_are_balanced_and_options_of_their_own_are_not_classes(make):
    config = make(TRAIN, test=TEST, num_demonstrations=5)
    items = [Item({"text": str(i)}, (" a", " b", " c"), 0 if i < 12 else 1 + i % 2, "") for i in range(16)]
    labels = [item.label for item in draw_demonstrations(items, config.data)]
    assert sorted(labels) == [0, 0, 1, 2, 2]  # class 1 and 2 have two each
    own = [Item({}, (f" {i}",), 0, "") for i in range(9)]
    assert len({item.options for item in draw_demonstrations(own, config.data)}) == 5


@pytest.mark.parametrize("max_length", range(30, 60))
def test_what_does_not_fit_is_left_out_and_said(bpe, make, caplog, max_length):
    train = [*TRAIN, {"text": "a long film " * 90, "label": 0}, {"text": "a long film " * 90, "label": 1}]
    config = make(
        train, test=TEST, prompt="{text} It was", label_words=WORDS, num_demonstrations=22, max_length=max_length
    )
    examples = load_splits(config, bpe)["test"]
    for example, own in zip(examples, ("a fine film It was", "a dull film It was"), strict=True):
        before, tested = parts(example, bpe)
        assert tested == own
        assert not any("long" in demo for demo in before)
        longest = len(example.prompt) + max(map(len, example.options))
        assert longest <= max_length < longest + 14  # another film would have fitted otherwise
    (record,) = caplog.records
    assert "test.jsonl: 2 of 2 prompts have room for fewer than 22 demonstrations" in record.getMessage()


def test_a_text_that_is_cut_anyway_has_no_demonstrations(bpe, make, caplog):
    rows = [{"text": "a film " * 90, "label": 1}]
    config = make(TRAIN, test=rows, prompt="{text} It was", label_words=WORDS, num_demonstrations=4, max_length=40)
    plain = load_splits(config.replace(num_demonstrations=0), bpe)["test"]
    assert load_splits(config, bpe)["test"] == plain
    assert "(the least: 0) at --max-length 40" in caplog.text


def test_nothing_is_said_where_all_fit(bpe, make, caplog):
    load_splits(make(TRAIN, test=TEST, prompt="{text} It was", label_words=WORDS, num_demonstrations=20), bpe)
    assert not caplog.records


def test_mistakes(bpe, make, roberta):
    fields = {"prompt": "{text} It was", "label_words": WORDS}
    with pytest.raises(UserError, match="--num-demonstrations is 21, but train has 20 examples: lower it"):
        load_splits(make(TRAIN, test=TEST, num_demonstrations=21, **fields), bpe)
    with pytest.raises(UserError, match="needs train and what is tested: give --train-file"):
        load_splits(make(None, test=TEST, num_demonstrations=2, **fields), bpe)
    with pytest.raises(UserError, match="needs train and what is tested: give --test-file"):
        load_splits(make(TRAIN, num_demonstrations=2, **fields), bpe)
    with pytest.raises(UserError, match="--num-demonstrations must be at least 0, got -1"):
        make(TRAIN, test=TEST, num_demonstrations=-1, **fields)
    masked = [{"text": "a <mask> film", "label": 0}, TRAIN[1]]
    config = make(masked, test=TEST, num_demonstrations=2, prompt="{text} It was<mask>.", label_words=WORDS)
    with pytest.raises(UserError, match=r"train\.jsonl line 1: a demonstration must have no mask"):
        load_splits(config, roberta)
