"""Every built-in task asks what the paper asks, from a row as the hub stores it to the tokens of prompt and options."""

import datasets
import pytest

from mezo.config import Config
from mezo.errors import UserError
from mezo.tasks import TASKS, load_splits, with_objective
from tests.tasks.hub_rows import HUB, ROWS, TEST_SPLIT, UNLABELLED

MASKED = {
    "sst2": ("a dull film . It was<mask>.", (" terrible", " great"), 0),
    "sst5": ("a fine film . It was<mask>.", (" terrible", " bad", " okay", " good", " great"), 3),
    "mr": ("a fine film . It was<mask>.", (" terrible", " great"), 1),
    "cr": ("the zoom is great . It was<mask>.", (" terrible", " great"), 1),
    "mpqa": ("strongly criticised It was<mask>.", (" terrible", " great"), 0),
    "subj": ("a warm , funny tale . This is<mask>.", (" objective", " subjective"), 1),
    "trec": (
        "<mask>: Who wrote Hamlet ?",
        (" Description", " Entity", " Expression", " Human", " Location", " Number"),
        3,
    ),
    "snli": ("Two dogs run?<mask>, the dogs sleep.", (" Yes", " Maybe", " No"), 2),
    "mnli": ("Is it far?<mask>, it may be far.", (" Yes", " Maybe", " No"), 1),
    "rte": ("Oslo is cold?<mask>, oslo is warm.", (" Yes", " No"), 1),
}
YES_NO = ("No", "Yes")
CAUSAL = {
    "sst2": ("a dull film . It was", (" terrible", " great"), 0),
    "sst5": ("a fine film . It was", (" terrible", " bad", " okay", " good", " great"), 3),
    "mr": ("a fine film . It was", (" terrible", " great"), 1),
    "cr": ("the zoom is great . It was", (" terrible", " great"), 1),
    "mpqa": ("strongly criticised It was", (" terrible", " great"), 0),
    "subj": ("a warm , funny tale . This is", (" objective", " subjective"), 1),
    "rte": ('Oslo is cold.\nDoes this mean that "Oslo is warm." is true? Yes or No?\n', ("Yes", "No"), 1),
    "cb": (
        'Suppose B: Do you think it rained? Can we infer that "it rained"? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
        2,
    ),
    "boolq": ("Ice is cold. Is ice cold?\n", YES_NO, 1),
    "wsc": (
        "Mark told Pete lies. He was wrong.\n"
        'In the previous sentence, does the pronoun "he" refer to Mark? Yes or No?\n',
        YES_NO,
        1,
    ),
    "wic": (
        'Does the word "place" have the same meaning in these two sentences? Yes, No?\n'
        "Do you want to come over to my place?\nA political system with no place for them.\n",
        YES_NO,
        0,
    ),
    "multirc": (
        "Ann went out. She saw Bo.\nQuestion: Who did Ann see?\n"
        'I found this answer "Bo". Is that correct? Yes or No?\n',
        YES_NO,
        1,
    ),
    "copa": ("My body cast a shadow over the grass because", (" the sun was rising.", " I cut the grass."), 0),
    "record": (
        "Ann Lee sang in Oslo.\n- Lee sang for an hour\n- Oslo was cold\n-",
        (" Fans of Oslo queued.", " Fans of Lee queued.", " Fans of Ann Lee queued."),
        2,
    ),
    "squad": (
        "Title: Ice_and_snow\nContext: Ice is cold. Snow is white.\nQuestion: What is cold?\nAnswer:",
        (" Ice\n",),
        0,
    ),
    "drop": ("Passage: The Bears kicked two goals, then one.\nQuestion: How many goals?\nAnswer:", (" 3\n",), 0),
}
TEXT_ANSWERS = ("copa", "record", "squad", "drop")


@pytest.fixture
def any_hub(monkeypatch):
    """The hub with every task's data set: 40 rows to train on, one to test on and one without an answer in each."""
    data = {}
    for name, path in HUB.items():
        rows = {"train": [ROWS[name]] * 40, TEST_SPLIT.get(name, "validation"): [ROWS[name]]}
        for own in rows.values():
            own += [UNLABELLED[name]] if name in UNLABELLED else []
        data[path] = datasets.DatasetDict({s: datasets.Dataset.from_list(own) for s, own in rows.items()})
    monkeypatch.setattr("datasets.load_dataset", lambda *path: data[path])


def config_of(name, **fields):
    return Config.of(model="m", output_dir="o", task=name, **fields)


def written(example, tokenizer):
    """Prompt and options of an example as text, from its tokens, and the label."""
    prompt = tokenizer.decode(example.prompt[1:]).removesuffix("</s>")
    return prompt, tuple(tokenizer.decode(option) for option in example.options), example.label


def test_every_task_is_tested():
    assert HUB.keys() == ROWS.keys() == TASKS.keys() == MASKED.keys() | CAUSAL.keys()
    assert [name for name, task in TASKS.items() if task.masked] == list(MASKED)
    assert [name for name, task in TASKS.items() if task.prompt] == [name for name in TASKS if name in CAUSAL]


@pytest.mark.parametrize("name", MASKED)
def test_masked(any_hub, roberta, name):
    splits = load_splits(config_of(name), roberta)
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 36, "dev": 4, "test": 1}
    for examples in splits.values():
        assert {written(example, roberta) for example in examples} == {MASKED[name]}
        assert all(e.prompt[e.mask] == roberta.mask_token_id for e in examples)
        assert all(len(option) == 1 for e in examples for option in e.options)


@pytest.mark.parametrize("name", CAUSAL)
def test_causal(any_hub, bpe, name):
    splits = load_splits(config_of(name, eval_train=True), bpe)
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 36, "dev": 4, "test": 1}
    assert {written(example, bpe) for examples in splits.values() for example in examples} == {CAUSAL[name]}


@pytest.mark.parametrize(("name", "masked"), [*((n, True) for n in MASKED), *((n, False) for n in CAUSAL)])
def test_local_files_with_the_hubs_fields(make, bpe, roberta, name, masked):
    """No hub is there: `any_hub` is not asked for."""
    wanted, tokenizer = (MASKED, roberta) if masked else (CAUSAL, bpe)
    config = make([ROWS[name]] * 12, test=[ROWS[name]], task=name)
    splits = load_splits(config, tokenizer)
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 11, "dev": 1, "test": 1}
    assert written(splits["test"][0], tokenizer) == wanted[name]


@pytest.mark.parametrize("name", TASKS)
def test_the_field_that_is_cut_is_one_of_the_template(name):
    for prompt in (TASKS[name].prompt, TASKS[name].masked):
        assert prompt is None or prompt.text_field is None or f"{{{prompt.text_field}}}" in prompt.template


def test_the_passage_is_cut_and_never_the_question(make, bpe):
    row = {**ROWS["multirc"], "paragraph": "Ann went out. " * 99}
    (example,) = load_splits(make([row], task="multirc", max_length=200), bpe)["train"]
    prompt, _, _ = written(example, bpe)
    assert prompt.startswith("Ann went out. Ann")
    assert prompt.endswith('\nQuestion: Who did Ann see?\nI found this answer "Bo". Is that correct? Yes or No?\n')
    assert len(example.prompt) + max(map(len, example.options)) == 200


# The objective


@pytest.mark.parametrize("name", TASKS)
def test_objective_of_the_task_unless_the_run_names_another(name):
    assert with_objective(config_of(name)).method.objective == (
        "lm_cross_entropy" if name in TEXT_ANSWERS else "cross_entropy"
    )
    assert with_objective(config_of(name, objective="accuracy")).method.objective == "accuracy"


def test_lm_training_has_the_right_option_alone(any_hub, bpe):
    splits = load_splits(config_of("record"), bpe)
    prompt, options, right = CAUSAL["record"]
    assert {written(example, bpe) for example in splits["train"]} == {(prompt, (options[right],), 0)}
    assert {written(e, bpe) for split in ("dev", "test") for e in splits[split]} == {CAUSAL["record"]}


def test_every_name_of_the_right_entity_is_right(any_hub, bpe):
    (example,) = load_splits(config_of("record"), bpe)["test"]
    assert example.references == ("Ann Lee", "Lee")
    assert example.names == ("Oslo", "Lee", "Ann Lee")
    trained = load_splits(config_of("record", objective="cross_entropy"), bpe)["train"][0]
    assert trained.names == ("Oslo", "Ann Lee"), "a loss over the options has one right"
    assert written(trained, bpe)[1:] == ((" Fans of Oslo queued.", " Fans of Ann Lee queued."), 1)


@pytest.mark.parametrize(("name", "answers"), [("squad", ("Ice", "Ice is")), ("drop", ("3", "three"))])
def test_generated_answers_are_judged_by_every_reference(any_hub, bpe, name, answers):
    config = with_objective(config_of(name))
    assert (config.method.generate, config.method.generates, TASKS[name].metric) == ("on", True, "f1")
    assert load_splits(config, bpe)["test"][0].references == answers
    assert load_splits(config_of(name, generate="off"), bpe)["test"][0].references == ()
    assert with_objective(config_of("boolq")).method.generate == "off"


def test_the_answer_of_a_label_is_its_word(any_hub, bpe):
    examples = load_splits(config_of("sst2", objective="f1"), bpe)["train"]
    assert examples[0].references == ("terrible",)
    assert examples[0].fields == {}, "a reward alone reads them"


def test_a_reward_reads_the_tasks_own_fields(any_hub, bpe):
    (example,) = load_splits(config_of("squad", objective="reward", reward="math:hypot"), bpe)["test"]
    assert example.fields["id"] == "5733be28"
    assert example.fields["references"] == ["Ice", "Ice is"]
    assert example.where == "squad test line 1"


def test_prompts_alone_are_enough_for_a_reward(make, bpe):
    rows = [{"prompt": f"a film {i}"} for i in range(9)]
    examples = load_splits(make(rows, objective="reward", reward="math:hypot", num_train=4), bpe)["train"]
    assert [(e.options, e.label, e.references) for e in examples] == [((), 0, ())] * 4
    with pytest.raises(UserError, match=r"line 1 has no field 'options'"):
        load_splits(make(rows, objective="f1"), bpe)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"references": "Ice"}, "line 1: references must be a list of non-empty strings, got 'Ice'"),
        ({"option_names": ["c", "b"]}, "line 1: option_names must be one an option, the right one's among references"),
    ],
)
def test_bad_references_name_their_line(make, bpe, fields, message):
    with pytest.raises(UserError, match=message):
        load_splits(make([{"prompt": "It was", "options": [" a", " b"], "answer": 0, **fields}]), bpe)


def test_text_answers_have_no_other_options(any_hub, bpe):
    with pytest.raises(UserError, match="options must be at least 2, got 1"):
        load_splits(config_of("squad", objective="cross_entropy"), bpe)


# Mistakes


def test_no_prompt_for_the_kind_of_model(any_hub, bpe, roberta):
    with pytest.raises(UserError, match="task snli has no prompt for a model that continues text: give --prompt"):
        load_splits(config_of("snli"), bpe)
    with pytest.raises(UserError, match="task cb has no prompt for a model that fills a mask: give --prompt"):
        load_splits(config_of("cb"), roberta)
    (example,) = load_splits(config_of("snli", prompt="{premise} {hypothesis}"), bpe)["test"]
    assert written(example, bpe) == ("Two dogs run. The dogs sleep.", (" Yes", " Maybe", " No"), 2)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("rte", {"premise": ...}, r"train\.jsonl line 2 has no field 'premise', which task rte takes; it has 'hyp"),
        ("squad", {"answers": None}, r"line 2 is not as task squad stores its rows .*: correct it"),
        ("trec", {"label_coarse_original": "XYZ"}, r"line 2 is not as task trec stores its rows"),
        ("cb", {"label": 3}, r"line 2: label must be an index into the 3 label words \(0 to 2\), got 3"),
        ("copa", {"label": 2}, r"line 2: answer must be one of the 2 options or its index from 0, got 2"),
        ("copa", {"choice2": "the sun was rising."}, r"line 2: two options are equal"),
    ],
)
def test_bad_rows_name_their_line(make, bpe, roberta, name, change, message):
    bad = {k: v for k, v in {**ROWS[name], **change}.items() if v is not ...}
    with pytest.raises(UserError, match=message) as error:
        load_splits(make([ROWS[name], bad], task=name), roberta if name == "trec" else bpe)
    assert "\n" not in str(error.value)


def test_a_file_without_any_answer(make, bpe):
    config = make([ROWS["cb"]] * 20, test=[UNLABELLED["cb"]], task="cb")
    with pytest.raises(UserError, match=r"test\.jsonl has no row with a known answer"):
        load_splits(config, bpe)


def test_files_replace_the_hub_altogether(any_hub, make, bpe):
    config = make(None, test=[ROWS["cb"]], task="cb")
    assert list(load_splits(config, bpe)) == ["test"]


# Sizes of the paper's protocol


def many(name, number):
    return [{**ROWS[name], "idx": i, "label": i % 2} for i in range(number)]


@pytest.mark.parametrize(("balance", "dev"), [("on", [46, 46, 8]), ("off", None)])
def test_cb_with_the_papers_100_dev_examples(make, bpe, balance, dev):
    """Its classes are as uneven as they come: dev must not take all of the rarest."""
    labels = [0] * 115 + [1] * 119 + [2] * 16
    rows = [{**ROWS["cb"], "idx": i, "label": label} for i, label in enumerate(labels)]
    splits = load_splits(make(rows, task="cb", num_dev=100, balance=balance), bpe)
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 150, "dev": 100}
    counts = {split: [[e.label for e in own].count(label) for label in range(3)] for split, own in splits.items()}
    assert min(counts["train"]) > 0
    assert counts["dev"] == dev or (balance == "off" and abs(counts["dev"][2] - 6.4) < 6)


def test_trec_with_512_of_each_class_where_there_are_as_many(make, roberta):
    """As the paper has it: 86 abbreviations in train, all of them, and none for dev."""
    sizes = {"DESC": 1162, "ENTY": 1250, "ABBR": 86, "HUM": 1223, "LOC": 835, "NUM": 896}
    rows = [{**ROWS["trec"], "label_coarse_original": code} for code, size in sizes.items() for _ in range(size)]
    config = make(rows, task="trec", k_shot=512, balance="off")
    splits = load_splits(config, roberta)
    counts = {split: [[e.label for e in own].count(label) for label in range(6)] for split, own in splits.items()}
    assert counts == {"train": [512, 512, 86, 512, 512, 512], "dev": [512, 512, 0, 512, 323, 384]}
    with pytest.raises(UserError, match=r"class 2 has 86 examples, k_shot asks for 512.* with --balance off"):
        load_splits(config.replace(balance="on"), roberta)


def test_copa_with_the_papers_100_dev_examples(make, bpe):
    splits = load_splits(make(many("copa", 400), task="copa", num_train=300, num_dev=100), bpe)
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 300, "dev": 100}


@pytest.mark.parametrize("balance", ["on", "off"])
def test_1000_500_1000(make, bpe, balance):
    """Five of eight answers are yes, of the balanced test set a half."""
    rows = [{**ROWS["boolq"], "answer": i % 8 > 2} for i in range(2000)]
    sizes = {"num_train": 1000, "num_dev": 500, "num_test": 1000}
    splits = load_splits(make(rows, test=rows, task="boolq", balance=balance, **sizes), bpe)
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 1000, "dev": 500, "test": 1000}
    yes = sum(example.label for example in splits["test"])
    assert yes == 500 if balance == "on" else 575 < yes < 675


@pytest.mark.parametrize("name", [name for name in MASKED if name != "sst2"])
def test_k_shot(make, roberta, name):
    words = TASKS[name].masked.label_words
    rows = [{**ROWS[name], "label": i % len(words)} for i in range(8 * len(words))]
    if name == "trec":
        codes = ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM")
        rows = [{**row, "label_coarse_original": codes[row["label"]]} for row in rows]
    splits = load_splits(make(rows, task=name, k_shot=4), roberta)
    for split in ("train", "dev"):
        assert sorted(e.label for e in splits[split]) == sorted(list(range(len(words))) * 4)
