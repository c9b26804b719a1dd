"""What users teach a run: what is kept, what it makes of it, and which mistake is named."""

import json

import pytest

from mezo.config import Config
from mezo.data.example import Example
from mezo.errors import UserError
from mezo.models.load import load_tokenizer
from mezo.run.feedback import FeedbackLog
from mezo.serve.learning import LONGEST, MOST_ROWS, REMEMBERED, Learning, Recent, Unknown
from mezo.serve.metrics import exposition
from mezo.tasks import load_splits
from tests.tiny_data import write_jsonl

ROWS = {
    "completion": [{"prompt": "the film", "completion": " was good"}, {"prompt": "a story", "completion": " was bad"}],
    "preference": [{"prompt": "the film", "chosen": " was good", "rejected": " was bad"}] * 2,
    "options": [{"prompt": "the film was", "options": [" good", " bad"], "answer": 0}] * 2,
    "text": [{"text": "the film was good"}, {"text": "a story was bad"}],
}
LABELLED = {"prompt": "{text} It was", "label_words": (" terrible", " great")}


@pytest.fixture(scope="module")
def further_of(tiny_model, tmp_path_factory):
    """(what makes examples, the examples of train) of data of a kind."""

    def made(kind, **options):
        path = tmp_path_factory.mktemp("rows") / "train.jsonl"
        if kind == "labelled":
            write_jsonl(path, 8, 0)
            options = LABELLED | options
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
        config = Config.of(model=tiny_model, train_file=str(path), output_dir="unused", **options)
        splits = load_splits(config, load_tokenizer(tiny_model))
        return splits.further, splits["train"]

    return made


@pytest.fixture(scope="module")
def labelled(further_of):
    return further_of("labelled")[0]


@pytest.fixture
def learning(labelled, tmp_path):
    return Learning(FeedbackLog(tmp_path, "data"), labelled, lambda examples: None, lambda: 7)


def sent(**body):
    return json.dumps(body).encode()


def test_a_row_is_the_example_that_a_file_makes_of_it(further_of):
    for kind, rows in ROWS.items():
        further, train = further_of(kind)
        assert further.of_row(rows[0], "the row") == [train[0]]
    further, train = further_of("labelled")
    assert further.of_row({"text": "the film was good", "label": 1}, "the row")[0].label == 1


def test_an_answer_is_the_example_of_its_prompt(further_of):
    further, _ = further_of("completion")
    (right,) = further.of_row(ROWS["completion"][0], "the row")
    assert further.of_answer("the film", " was good", (), 0.5) == [right]
    assert further.of_answer("the film", " was good", (), 0) == []
    assert further.of_answer(right.prompt, " was good", right.options[0], 1) == [right]
    further, _ = further_of("text")
    assert further.of_answer("the film", " was good", (), 1) == [right]


def test_of_two_label_words_a_wrong_answer_says_that_the_other_is_right(further_of):
    further, _ = further_of("labelled")
    (row,) = further.of_row({"text": "a nice film", "label": 1}, "the row")
    for completion, score in ((" great", 1), ("great", 0.1), (" terrible", 0), ("Terrible ", -1)):
        assert further.of_answer("a nice film It was", completion, (), score) == [row]
        assert further.of_answer(row.prompt, completion, (), score) == [row]
    three = further_of("labelled", label_words=(" terrible", " great", " fine"))[0]
    assert three.of_answer("a film It was", " fine", (), -1) == []
    assert three.of_answer("a film It was", " fine", (), 1)[0].label == 2


def test_under_a_loss_of_the_answer_alone_its_example_has_no_other_option(further_of):
    further, train = further_of("labelled", objective="lm_cross_entropy")
    (example,) = further.of_answer(train[1].prompt, " great", (), 1)
    assert (len(example.options), example.label) == (1, 0)
    assert example.options == train[1].options


@pytest.mark.parametrize("kind", ["preference", "options"])
def test_an_answer_that_is_no_example_of_the_task_is_refused(further_of, kind):
    with pytest.raises(UserError, match=r"completion: .* give a whole row to /mezo/examples"):
        further_of(kind)[0].of_answer("the film", " was good", (), 1)


def test_what_does_not_fit_is_refused_or_cut_as_in_files(further_of):
    further, _ = further_of("completion", max_length=8)
    with pytest.raises(UserError, match="prompt: with its completion it has 9 tokens, --max-length is 8"):
        further.of_answer((5,) * 7, "x", (6, 7), 1)
    (cut,) = further.of_answer("film " * 20, " good", (), 1)
    assert len(cut.prompt) + len(cut.options[0]) <= 8


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body: it is not JSON"),
        (b"{", "the body: it is not JSON"),
        (b"[" * 100_000, "the body: it is not JSON"),
        (b"\xff\xfe", "the body: it is not JSON"),
        (b'{"prompt": "a", "completion": "great", "score": NaN}', "the body: it is not JSON (NaN"),
        (b'{"prompt": "a", "completion": "great", "score": 1e999}', "score: "),
        (b"[]", "the body: "),
        (b"null", "the body: "),
        (sent(), "score: it is missing"),
        (sent(score=1), "the body: give request_id, or prompt and completion"),
        (sent(score=1, prompt="a"), "the body: give request_id, or prompt and completion"),
        (sent(score=1, completion="great"), "the body: give request_id, or prompt and completion"),
        (sent(score=1, request_id="x", prompt="a"), "the body: give request_id, or prompt and completion"),
        (sent(score=1, request_id=""), "request_id: "),
        (sent(score=1, request_id=5), "request_id: "),
        (sent(score=1, request_id="x" * 201), "request_id: "),
        (sent(score="1", prompt="a", completion="great"), "score: it must be a valid number, got '1'"),
        (sent(score=True, prompt="a", completion="great"), "score: "),
        (sent(score=1.5, prompt="a", completion="great"), "score: it must be less than or equal to 1, got 1.5"),
        (sent(score=-2, prompt="a", completion="great"), "score: it must be greater than or equal to -1, got -2"),
        (sent(score=1, prompt="", completion="great"), "prompt: "),
        (sent(score=1, prompt=["a"], completion="great"), "prompt: "),
        (sent(score=1, prompt="a" * (LONGEST + 1), completion="great"), "prompt: "),
        (sent(score=1, prompt="a", completion="so-so"), "completion: it must be one of the label words ' terrible'"),
        (sent(score=1, prompt="\ud800", completion="great"), "prompt"),
        (sent(score=1, prompt="a", completion="great", output_dir="/tmp"), "output_dir: there is no such field"),
        (sent(score=1, prompt="a", completion="great", target_modules=["q_proj"]), "target_modules: there is no such"),
    ],
)
def test_malformed_feedback_names_its_field_and_keeps_nothing(learning, body, message):
    with pytest.raises(UserError) as caught:
        learning.feedback(body)
    assert message in str(caught.value)
    assert (len(learning.log), learning.refused) == (0, 1)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body: it is not JSON"),
        (b"5", "the row must be an object with the fields of the task, got 5"),
        (b"[]", f"a list of 1 to {MOST_ROWS} rows, got 0"),
        (json.dumps([{}] * (MOST_ROWS + 1)).encode(), f"a list of 1 to {MOST_ROWS} rows"),
        (sent(), "the row has no field 'text', which the prompt takes"),
        (sent(text="a"), "the row has no field 'label'"),
        (sent(text="a", label=2), "label must be an index into the 2 label words"),
        (sent(text="a", label="great"), "label must be"),
        (sent(text=["a"], label=1), "field 'text' must be a string or a number"),
        (sent(text="\ud800", label=1), "'text' holds half a surrogate pair"),
        (sent(text="a", label=1, chat_template_kwargs={"a": 1}), "chat_template_kwargs are options"),
        (json.dumps([{"text": "a", "label": 1}, {"text": "a"}]).encode(), "row 1 has no field 'label'"),
    ],
)
def test_malformed_rows_name_their_field_and_keep_nothing(learning, body, message):
    with pytest.raises(UserError) as caught:
        learning.examples(body)
    assert message in str(caught.value)
    assert (len(learning.log), learning.refused) == (0, 1)


def test_what_is_right_is_kept_with_what_came(learning, tmp_path):
    rows = [{"text": "a film", "label": i, "output_dir": "/etc"} for i in (0, 1)]
    assert learning.examples(json.dumps(rows).encode()) == {"kept": 2, "examples": 2, "lines": 2}
    assert learning.examples(json.dumps(rows[0]).encode())["lines"] == 3
    answered = learning.feedback(sent(prompt="a film It was", completion=" great", score=1))
    assert answered == {"kept": 1, "examples": 1, "lines": 4}
    lines = [json.loads(line) for line in (tmp_path / "feedback.jsonl").read_text().splitlines()]
    assert [line["at"] for line in lines] == [7] * 4
    assert [line["given"] for line in lines[:3]] == [*rows, rows[0]]
    assert lines[3]["given"] == {"score": 1.0, "prompt": "a film It was", "completion": " great"}
    assert FeedbackLog(tmp_path, "data").examples(0, 4) == learning.log.examples(0, 4)


def test_an_example_that_the_engine_has_no_room_for_is_not_kept(labelled, tmp_path):
    def refuse(examples):
        raise UserError("an example has 9 tokens, this engine has room for 8: shorten it")

    learning = Learning(FeedbackLog(tmp_path, "data"), labelled, refuse, lambda: 0)
    with pytest.raises(UserError, match="room for 8"):
        learning.examples(sent(text="a film", label=1))
    assert len(learning.log) == 0
    closed = Learning(learning.log, None, refuse, lambda: 0)
    with pytest.raises(UserError, match="takes no further examples"):
        closed.examples(sent(text="a film", label=1))


def answer(request_id, text, reason="stop", **others):
    meta = {"id": request_id, "finish_reason": reason and {"type": reason}}
    return {"text": text, "output_ids": [7], "meta_info": meta, **others}


def test_the_last_answers_can_be_named(learning):
    learning.recent.add("a nice film It was", [answer("r1", " great", None)])
    with pytest.raises(Unknown, match="request_id: 'r1' is none of the last 1000 answers"):
        learning.feedback(sent(request_id="r1", score=1))
    learning.recent.add("a nice film It was", [answer("r1", " great")])
    assert learning.feedback(sent(request_id="r1", score=1))["examples"] == 1
    assert learning.log.examples(0, 1) == learning.further.of_row({"text": "a nice film", "label": 1}, "the row")


def test_answers_are_remembered_with_the_prompt_that_is_theirs():
    recent = Recent()
    recent.add([5, 6], [answer("tokens", "x")])
    recent.add(["a", "b"], [answer("first", "x"), answer("second", "y")])
    recent.add(["a", "b"], [answer("streamed", "z", index=1)])
    recent.add("a", [answer("one", "x"), answer("another of one prompt", "y")])
    recent.add("a" * (LONGEST + 1), [answer("long", "x")])
    recent.add("a", [answer("its client left", "x", "abort")])
    asked = ("tokens", "first", "second", "streamed", "one")
    assert [recent[each].prompt for each in asked] == [(5, 6), "a", "b", "b", "a"]
    assert len(recent) == len(asked)
    for i in range(REMEMBERED):
        recent.add("a", [answer(f"r{i}", "x")])
    assert len(recent) == REMEMBERED
    with pytest.raises(KeyError):
        recent["tokens"]


def test_metrics_are_read_by_prometheus():
    parser = pytest.importorskip("prometheus_client.parser")
    waits = {"first_token": {"alone": {"n": 2, "p50": 0.1, "p99": 0.2}, "behind_a_part": {"n": 0}}}
    status = {
        "step": 12, "steps": 40, "promoted": 8, "state": 'odd "state"\\\n',
        "dev": [{"step": 8, "accuracy": 0.5, "is_best": True}, {"step": 12, "loss": 0.5, "accuracy": 0.75}],
        "users": {"requests": 3, "seconds": 1.5, "tokens": {"prompt": 4, "completion": 5}, "seconds_waited": waits},
        "training": {"tokens": {"steps": 6, "evaluations": 7}, "seconds": 2.5, "seconds_held_back": 0.5},
        "fed": {"feedback": 1, "example": 2, "refused": 3, "in_use": 2},
    }  # fmt: skip
    families = {family.name: family for family in parser.text_string_to_metric_families(exposition(status))}
    samples = {(sample.name, *sample.labels.values()): sample.value for f in families.values() for sample in f.samples}
    assert samples["mezo_step",] == 12
    assert samples["mezo_promoted_step",] == 8
    assert samples["mezo_state", 'odd "state"\\\n'] == 1
    assert samples["mezo_dev", "accuracy"] == 0.75
    assert samples["mezo_dev_step",] == 12
    assert samples["mezo_tokens_total", "users_completion"] == 5
    assert samples["mezo_seconds_total", "training_held_back"] == 0.5
    assert samples["mezo_user_wait_seconds", "first_token", "False", "99"] == 0.2
    assert samples["mezo_fed_total", "example"] == 2
    assert all(family.documentation for family in families.values())
    assert exposition({}) == ""


def test_an_example_is_kept_with_all_that_it_is_judged_by(tmp_path):
    log = FeedbackLog(tmp_path, "data")
    whole = Example((5,), ((6, 7), (8,)), 1, references=("a",), names=("b", "a"), fields={"text": "a", "n": 1})
    log.append(lambda: 0, "example", [({}, [whole])])
    (found,) = FeedbackLog(tmp_path, "data").examples(0, 1)
    assert (found, found.fields) == (whole, whole.fields)
