"""Texts, conversations, completions and preferences as TRL has them."""

import copy

import datasets
import pytest

from mezo.api import train
from mezo.config import Config
from mezo.errors import UserError
from mezo.tasks import load_splits, with_objective
from tests.data.test_formats import CHAT, config_of, write

HELLO = [{"role": "user", "content": "a film"}, {"role": "assistant", "content": "It was great"}]
BOTH = [*HELLO, {"role": "user", "content": "was it"}, {"role": "assistant", "content": "dull"}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def read(bpe, tmp_path, rows, form="jsonl", **fields):
    """Kind of objective, and (prompt, options) as text of each example."""
    config = config_of(write(tmp_path, rows, form), **fields)
    examples = load_splits(config, bpe)["train"]
    assert all(example.label == 0 for example in examples)
    shown = [(bpe.decode(example.prompt), tuple(map(bpe.decode, example.options))) for example in examples]
    return with_objective(config).method.objective, shown


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_text_alone_is_scored_from_its_second_token(bpe, tmp_path, form):
    expected = "lm_cross_entropy", [("<s>", ("a fine film</s>",))]
    assert read(bpe, tmp_path, [{"text": "a fine film"}], form) == expected


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_prompt_and_completion(bpe, tmp_path, form):
    rows = [{"prompt": "a film", "completion": " It was great"}, {"prompt": "It was ", "completion": "great"}]
    objective, (first, second) = read(bpe, tmp_path, rows, form)
    assert objective == "lm_cross_entropy"
    assert first == ("<s>a film", (" It was great</s>",))
    assert second == ("<s>It was", (" great</s>",)), "a token across the border is the completion's"


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_each_turn_of_the_assistant_is_an_example(bpe, tmp_path, form, caplog):
    with caplog.at_level("INFO", "mezo"):
        objective, shown = read(bpe, tmp_path, [{"messages": BOTH}], form, chat_template=CHAT)
    assert objective == "lm_cross_entropy"
    assert shown == [
        ("[user]a film\n[assistant]", ("It was great\n",)),
        ("[user]a film\n[assistant]It was great\n[user]was it\n[assistant]", ("dull\n",)),
    ]
    assert "examples: 2 of train" in caplog.text


def test_conversations_of_from_and_value(bpe, tmp_path):
    turns = [{"from": "human", "value": "a film"}, {"from": "gpt", "value": "dull"}]
    _, shown = read(bpe, tmp_path, [{"conversations": turns}], chat_template=CHAT)
    assert shown == [("[user]a film\n[assistant]", ("dull\n",))]


def test_prompt_and_completion_of_messages(bpe, tmp_path):
    rows = [{"prompt": HELLO[:1], "completion": HELLO[1:]}]
    for form in ("jsonl", "parquet"):
        _, shown = read(bpe, tmp_path, rows, form, chat_template=CHAT)
        assert shown == [("[user]a film\n[assistant]", ("It was great\n",))]


def test_the_template_may_be_the_tokenizers_or_a_file(bpe, tmp_path, monkeypatch):
    rows, file = [{"messages": HELLO}], tmp_path / "chat.jinja"
    file.write_text(CHAT)
    expected = read(bpe, tmp_path, rows, chat_template=CHAT)
    assert read(bpe, tmp_path, rows, chat_template=str(file)) == expected
    monkeypatch.setattr(bpe, "chat_template", CHAT)
    assert read(bpe, tmp_path, rows) == expected


def test_a_preference_has_two_options(bpe, tmp_path):
    rows = [{"prompt": "a film It was", "chosen": " great", "rejected": " terrible"}]
    expected = "cross_entropy", [("<s>a film It was", (" great</s>", " terrible</s>"))]
    assert read(bpe, tmp_path, rows, "csv") == expected
    implicit = [{"chosen": "a film It was great", "rejected": "a film It was terrible"}]
    assert read(bpe, tmp_path, implicit) == expected
    turns = [{"chosen": HELLO, "rejected": [HELLO[0], {"role": "assistant", "content": "dull"}]}]
    shown = read(bpe, tmp_path, turns, "parquet", chat_template=CHAT)[1]
    assert shown == [("[user]a film\n[assistant]", ("It was great\n", "dull\n"))]


CHATS = {"chat_template": CHAT}
ASKED, HALF = {"prompt": "a", "completion": " b"}, {"prompt": HELLO[:1], "completion": "b"}
BAD = {
    "no template": ([{"messages": HELLO}], {}, r"has no chat template: give --chat-template FILE\.jinja"),
    "no such template": ([{"messages": HELLO}], {"chat_template": "gone"}, r"--chat-template gone: no such file"),
    "no assistant": ([{"messages": HELLO}, {"messages": HELLO[:1]}], CHATS, r"line 2 has no assistant turn"),
    "assistant begins": ([{"messages": HELLO[1:]}], CHATS, r"line 1 begins with the assistant"),
    "no list": ([{"messages": "hi"}], CHATS, r"line 1: messages must be a list of messages"),
    "no role": ([{"messages": [{"content": "a"}]}], CHATS, r"a message must have role and content"),
    "refused": (
        [{"messages": HELLO}],
        {"chat_template": "{{ raise_exception('no') }}"},
        r"line 1: the chat",
    ),
    "rewritten": (
        [{"messages": HELLO}],
        {"chat_template": "{{ messages | length }}"},
        r"otherwise once it is answered",
    ),
    "no completion": ([ASKED, {"prompt": "a"}], {}, r"line 2 has no value in the column 'completion'"),
    "mixed": ([ASKED, HALF], {}, r"line 2: .* must be text"),
    "mixed chats": ([{**HALF, "completion": HELLO[1:]}, ASKED], CHATS, r"line 2: .* must all be messages"),
    "nothing in common": ([{"chosen": "a", "rejected": "b"}], {}, r"begin with nothing in common, and have no prompt"),
    "no end": ([{"text": ""}], {}, r"has fewer than two tokens"),
    "too long": ([{"prompt": "a film " * 9, "completion": " great"}], {"max_length": 8}, r"only \{text\} is cut"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_line(bpe, tmp_path, name):
    rows, fields, message = BAD[name]
    if name == "no end":
        bpe = copy.deepcopy(bpe)
        bpe.eos_token = None
    with pytest.raises(UserError, match=message) as error:
        load_splits(config_of(write(tmp_path, rows, "jsonl"), **fields), bpe)
    assert "\n" not in str(error.value)


def test_a_prompt_is_cut_at_the_left_where_that_is_asked(bpe, tmp_path):
    rows = [{"prompt": "fine film a dull film", "completion": " great"}]
    _, ((prompt, options),) = read(bpe, tmp_path, rows, max_length=6, truncation="left")
    assert prompt.endswith("a dull film")
    assert options == (" great</s>",)


def test_an_encoder_is_told_what_it_cannot_do(encoder, tmp_path):
    with pytest.raises(UserError, match="which needs a model that continues text"):
        load_splits(config_of(write(tmp_path, [{"text": "a fine film"}], "jsonl")), encoder)


def test_a_preference_is_learnt_by_a_run(tiny_options, tmp_path):
    """The right option of each prompt rises: what a preference likelihood says."""
    words = ("film", "story", "plot", "acting")
    rows = [{"prompt": f"the {word} was", "chosen": "good", "rejected": "very bad"} for word in words]
    path = write(tmp_path, rows, "parquet")
    unused = dict.fromkeys(("prompt", "dev_file", "test_file"), "")
    options = {**tiny_options, **unused, "train_file": path, "label_words": (), "steps": 40, "batch_size": 4}
    result = train(Config.of(**options, noise=False, eval_train=True))
    assert result["train"]["after"]["loss"] < result["train"]["before"]["loss"]


def test_the_formats_are_those_of_datasets(bpe, tmp_path):
    """What TRL's own documentation shows, as a `datasets.Dataset`."""
    data = datasets.Dataset.from_dict({"messages": [HELLO, BOTH]})
    data.save_to_disk(tmp_path / "saved")
    config = config_of(str(tmp_path / "saved"), chat_template=CHAT)
    assert len(load_splits(config, bpe)["train"]) == 3
