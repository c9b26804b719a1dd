"""Rewards of the user's own: how they are found, what they see, and what they must give."""

import re

import pytest

from mezo.config import Config
from mezo.data.example import Example
from mezo.data.rewards import Reward, judges, reward_hash
from mezo.errors import UserError

EXAMPLE = Example((3,), (), 0, references=("ice", "the snow"), fields={"id": 7}, where="train.jsonl line 4")


@pytest.fixture
def source(tmp_path):
    """A function that writes a reward and gives what --reward takes."""

    def write(body, name="reward"):
        (tmp_path / "mine.py").write_text(f"def reward(example, output):\n    {body}\n")
        return f"{tmp_path / 'mine.py'}:{name}"

    return write


def options(**fields):
    return Config.of(**{"model": "m", "output_dir": "o", "task": "squad", **fields})


def test_a_reward_gets_the_fields_and_the_text(source):
    assert Reward(source("return example['id'] + len(output)"))(EXAMPLE, "ice") == 10.0
    assert Reward("operator:contains")(EXAMPLE, "id") == 1.0


def test_a_reward_cannot_change_the_example(source):
    Reward(source("example.clear()\n    return 0"))(EXAMPLE, "")
    assert EXAMPLE.fields == {"id": 7}


def test_a_file_may_define_dataclasses(tmp_path):
    text = "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\n"
    (tmp_path / "json.py").write_text(text + "def fn(example, output):\n    return A(3).x\n")
    assert Reward(f"{tmp_path / 'json.py'}:fn")(EXAMPLE, "") == 3.0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return example['no']", "raised KeyError: 'no' on train.jsonl line 4 with the text 'ice'"),
        ("return float('nan')", "gave nan for train.jsonl line 4 with the text 'ice': it must be a finite number"),
        ("return float('inf')", "gave inf for train.jsonl line 4"),
        ("return 'good'", "gave 'good' for train.jsonl line 4"),
        ("return None", "gave None for train.jsonl line 4"),
        ("return [1.0]", "gave [1.0] for train.jsonl line 4"),
        ("raise ValueError('a\\nb')", "raised ValueError: a b on train.jsonl line 4"),
    ],
)
def test_bad_values_name_the_example(source, body, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        Reward(source(body))(EXAMPLE, "ice")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere.py:fn", "--reward nowhere.py:fn: no such file: nowhere.py"),
        ("no_such_module:fn", "cannot be imported (ModuleNotFoundError: No module named 'no_such_module')"),
        ("math:nothing", "math has no function nothing: define it as nothing(example, output)"),
        ("math:pi", "math has no function pi"),
        ("reward", "--reward must be file.py:function or module:function, got 'reward'"),
    ],
)
def test_rewards_that_are_not_there(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Reward(text)


def test_a_file_that_fails_is_named(source, tmp_path):
    (tmp_path / "mine.py").write_text("x = (\n")
    with pytest.raises(UserError, match=r"it cannot be imported .SyntaxError"):
        Reward(f"{tmp_path / 'mine.py'}:reward")


def test_the_hash_is_that_of_the_file(source, tmp_path):
    first = reward_hash(source("return 1"))
    assert first == reward_hash(source("return 1"))
    assert first != reward_hash(source("return 2"))
    assert len(reward_hash("json.decoder:JSONDecoder")) == 64
    with pytest.raises(UserError, match=r"nowhere\.py cannot be read"):
        reward_hash("nowhere.py:fn")


def test_judges_of_a_run(source):
    reward = source("return -len(output)")
    made = judges(options(objective="cross_entropy:1,reward:0.5", reward=reward, generate="on").method)
    assert {name: judge(EXAMPLE, "snow") for name, judge in made.items()} == {
        "f1": 1.0,
        "exact_match": 1.0,
        "reward": -4.0,
    }
    assert list(judges(options(objective="f1").method)) == ["f1", "exact_match"]
    assert list(judges(options(objective="reward", reward=reward).method)) == ["reward"]
    assert judges(options(objective="accuracy", generate="off").method) == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "reward"}, "--objective reward needs --reward file.py:function"),
        ({"reward": "a.py:f"}, "--reward a.py:f is not in --objective"),
        ({"objective": "f1:0"}, "the weight of f1 must be a finite number > 0, got 0.0"),
        ({"objective": "f1:x"}, "a weight must be a number, got 'x'"),
        ({"objective": "f1,f1:2"}, "f1 is there twice"),
        ({"objective": "f1,auto"}, "--objective must be one of auto, .*; got 'auto'"),
        ({"z_score_rewards": True}, "--z-score-rewards needs f1 or reward in --objective"),
        ({"temperature": 0.7}, "--temperature needs f1 or reward in --objective"),
        (
            {"objective": "f1", "center_rewards": True},
            "--center-rewards changes what --z-score-rewards divides by, else nothing: give both",
        ),
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1, got 0"),
        ({"stop": ("",)}, "--stop must not be empty text"),
    ],
)
def test_options_that_do_not_fit(fields, message):
    with pytest.raises(UserError, match=message):
        options(**fields)


def test_a_mixture_has_weights():
    config = options(objective="cross_entropy, reward:0.5", reward="a.py:f", stop=(r"\n", "."))
    assert config.method.objectives == {"cross_entropy": 1.0, "reward": 0.5}
    assert config.method.scores
    assert config.method.generates
    assert config.method.stops == ("\n", ".")
    assert config.absolute().method.reward.endswith("/a.py:f")
    assert config.absolute().method.reward.startswith("/")
