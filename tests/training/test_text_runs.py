"""Whole runs on generated text: rewards that rise, exact resume, figures of SQuAD and ReCoRD."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from mezo.api import evaluate, resume, train
from mezo.cli.main import main
from mezo.config import Config
from mezo.data.example import Example
from mezo.errors import UserError
from mezo.method.batches import Batches
from mezo.method.objectives import cross_entropy
from mezo.method.sampling import Sampling, text_seed
from mezo.method.step import Step
from mezo.report import tables
from mezo.run.adapter import load_adapter, read_adapter
from mezo.run.header import INITIAL, initial_theta
from mezo.run.trajectory import read_trajectory
from mezo.runtimes.hf.runtime import HFRuntime
from mezo.tasks import load_splits
from mezo.training.evaluation import _of_named_options, best_by
from tests.tiny_models import LAST_LAYER, WORDS, save, tokenizer
from tests.training.test_trainer import adapter, interrupted_copy, same_bits

NEW = 8
EVERYWHERE = (*LAST_LAYER["llama"], "k_proj", "v_proj")
SHARE = f"def share(example, output):\n    return output.split().count('great') / {NEW}\n"


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """Every token of it is a word."""
    return save("llama", tmp_path_factory.mktemp("words"), vocab_size=len(WORDS) + 3)


@pytest.fixture
def write(tmp_path):
    """Rows as JSON lines; the path."""

    def lines(name, rows):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return lines


@pytest.fixture
def config(text_model, write, tmp_path):
    """A run of 20 steps on a reward: the share of "great" in the text."""
    nouns, words = ("film", "plot", "story", "acting"), ("good", "poor", "nice")
    rows = [{"prompt": f"{a} {n} was", "options": [f" {w}", " awful"], "answer": 0}
            for a in ("the", "a") for n in nouns for w in words]  # fmt: skip
    (tmp_path / "mine.py").write_text(SHARE)
    return Config.of(
        model=text_model, output_dir=str(tmp_path / "run"), train_file=write("train", rows),
        dev_file=write("dev", rows), test_file=write("test", rows[:6]), objective="reward",
        reward=f"{tmp_path / 'mine.py'}:share", steps=20,
        batch_size=8, max_new_tokens=NEW, lr=0.05, eps=0.1, target_modules=EVERYWHERE, eval_every=5, noise=False,
    )  # fmt: skip


def test_a_reward_rises(config, capfd):
    result = train(config.replace(steps=150, eval_every=30, report=True))
    rewards = {row["step"]: row["reward"] for row in result["dev"]}
    assert rewards[0] < 0.1
    assert rewards[result["best_step"]] == max(rewards.values()) > 0.3
    assert result["test"]["after"]["reward"] > result["test"]["before"]["reward"] + 0.2
    page = (Path(config.machine.output_dir) / "report.html").read_text()
    assert "dev reward" in page
    head, *texts = tables.tables(config.machine.output_dir)["texts of dev at each evaluation"]
    assert head == ("step", "prompt", "right", "text", "judged")
    assert [row[0] for row in texts] == [str(step) for step in range(0, 151, 30) for _ in range(3)]
    assert all(row[1].endswith(" was") and row[2] in ("good", "poor", "nice") for row in texts)
    assert [float(row[4].removeprefix("reward ")) for row in texts] == pytest.approx(
        [row[3].split().count("great") / NEW for row in texts], abs=1e-3
    )
    assert all(f"<td>{row[3]}</td>" in page for row in texts)
    assert re.search(r"for example '.* was' -> '.*' \(right: 'good'; reward 0\.?\d*\)", capfd.readouterr().err)


CONFIGURATIONS = {
    "reward": {},
    "z-scored": {"z_score_rewards": True, "num_perturbations": 2},
    "sampled": {"temperature": 1.0, "z_score_rewards": True, "center_rewards": True, "directions": 4},
    "f1": {"objective": "f1", "reward": ""},
    "mixture": {"objective": "cross_entropy:1,reward:0.5,f1:0.25"},
    "mixture above a trunk": {"objective": "lm_cross_entropy,reward:2", "layers_to_transform": (2,)},
    "micro-batches": {"micro_batch_size": 3, "noise": True},
}


@pytest.mark.parametrize("name", list(CONFIGURATIONS))
def test_resume_is_exact(config, tmp_path, name):
    config = config.replace(**CONFIGURATIONS[name])
    result = train(config)
    run, copy = Path(config.machine.output_dir), tmp_path / "copy"
    assert result["zero_gradient_share"] < 0.9, "texts differ, or nothing is proved"
    interrupted_copy(run, copy, 13)
    again = resume(str(copy), trust_reward=True)
    assert (copy / "trajectory.jsonl").read_bytes() == (run / "trajectory.jsonl").read_bytes()
    assert same_bits(adapter(copy), adapter(run))
    assert again["test"] == result["test"]


def test_a_reward_is_run_only_where_the_user_says_so_and_it_is_the_same_file(config, tmp_path, capsys):
    train(config.replace(steps=4))
    run, copy = Path(config.machine.output_dir), tmp_path / "copy"
    assert len(read_trajectory(run / "trajectory.jsonl")[0]["reward_hash"]) == 64
    interrupted_copy(run, copy, 2)
    with pytest.raises(UserError, match=r"is Python code that this would run: read it and give --trust-reward"):
        resume(str(copy))
    shutil.copy(tmp_path / "mine.py", tmp_path / "moved.py")
    (tmp_path / "mine.py").write_text("raise SystemExit('imported')")
    for command in (["train", "--resume", str(copy)], ["eval", str(copy)]):
        for word in ([], ["--trust-reward"], ["--reward", f"{tmp_path / 'mine.py'}:share"]):
            assert main([*command, *word]) == 2
            assert ("was made with another file" if word else "--trust-reward") in capsys.readouterr().err
    assert main(["train", "--resume", str(copy), "--reward", f"{tmp_path / 'moved.py'}:other"]) == 2
    assert main(["train", "--resume", str(copy), "--reward", f"{tmp_path / 'moved.py'}:share"]) == 0
    (tmp_path / "mine.py").unlink()
    interrupted_copy(run, tmp_path / "again", 2)
    with pytest.raises(UserError, match=r"mine\.py cannot be read"):
        resume(str(tmp_path / "again"), trust_reward=True)


def test_what_a_reward_reads_is_of_the_data_hash(config, write):
    hashes = []
    for year in (1999, 2000):
        rows = [{"prompt": "the film was", "year": year, "options": [" good", " bad"], "answer": 0}] * 8
        changed = config.replace(
            train_file=write("years", rows), steps=1, output_dir=f"{config.machine.output_dir}-{year}"
        )
        train(changed)
        hashes.append(read_trajectory(Path(changed.machine.output_dir) / "trajectory.jsonl")[0]["data_hash"])
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize("way", ["plain", "z-scored", "sampled, centred, z-scored"])
def test_losses_are_those_of_the_formula(config, way):
    """Two perturbations, a mixture: recomputed from scores and texts at the same theta."""
    z_score, temperature = "z-scored" in way, 0.7 * ("sampled" in way)
    config = config.replace(
        objective="cross_entropy:2,reward:0.5", z_score_rewards=z_score, center_rewards="centred" in way,
        temperature=temperature, num_perturbations=2, steps=1,
    )  # fmt: skip
    train(config)
    first, (record,) = read_trajectory(Path(config.machine.output_dir) / "trajectory.jsonl")
    splits, runtime = load_splits(config, tokenizer()), HFRuntime(*config.for_runtime)
    runtime.prepare(splits)
    runtime.load(initial_theta(first, Path()))
    batch = Batches(24, 8, 0)(0)
    labels = torch.tensor([splits["train"][i].label for i in batch])
    losses, rewards = [], []
    for seed in record.update.seeds:
        runtime.perturb(Step([seed], config.method.eps))
        losses.append([cross_entropy(scores, labels).item() for scores in runtime.score_pairs("train", batch)[0]])
        sampling = Sampling(temperature, record.text_seed) if temperature else None
        texts = runtime.generate_pairs("train", batch, NEW, ("\n",), sampling=sampling)[0]
        rewards.append([[text.split().count("great") / NEW for text in own] for own in texts])
    values = torch.tensor(rewards, dtype=torch.float64)
    assert len(values.unique()) > 1
    values = values - values.mean((0, 1)) if "centred" in way else values
    values = (values - values.mean()) / values.std(correction=0) if z_score else values
    expected = 2 * torch.tensor(losses, dtype=torch.float64) - 0.5 * values.mean(-1)
    assert record.losses.plus == pytest.approx(expected[:, 0].tolist(), abs=1e-6)
    assert record.losses.minus == pytest.approx(expected[:, 1].tolist(), abs=1e-6)


def test_the_seed_of_sampled_texts_is_checked(config, tmp_path):
    train(config.replace(temperature=1.0, steps=3))
    run = Path(config.machine.output_dir)
    _, records = read_trajectory(run / "trajectory.jsonl")
    assert [record.text_seed for record in records] == [text_seed(0, step) for step in range(3)]
    assert main(["trajectory", "verify", str(run)]) == 0
    log = (run / "trajectory.jsonl").read_text()
    for wrong in ("5", ""):
        field = f', "text_seed": {records[1].text_seed}'
        changed = log.replace(field, f', "text_seed": {wrong}' if wrong else "")
        (run / "trajectory.jsonl").write_text(changed)
        assert changed != log
        assert main(["trajectory", "verify", str(run)]) != 0


def test_equal_rewards_move_nothing(config, tmp_path):
    (tmp_path / "mine.py").write_text("def share(example, output):\n    return 0.1\n")
    result = train(config.replace(z_score_rewards=True, steps=3))
    assert result["zero_gradient_share"] == 1.0
    assert result["skipped_steps"] == 0


@pytest.mark.parametrize(
    ("body", "message"),
    [("1 / 0", r"raised ZeroDivisionError: division by zero on .*train\.jsonl line 1"), ("'x'", "gave 'x' for")],
)
def test_a_reward_that_fails_is_found_before_anything_is_written(config, tmp_path, body, message):
    (tmp_path / "mine.py").write_text(f"def share(example, output):\n    return {body}\n")
    with pytest.raises(UserError, match=message):
        train(config)
    assert not Path(config.machine.output_dir).exists()


def test_a_reward_that_fails_in_a_run_names_the_example(config, tmp_path):
    (tmp_path / "mine.py").write_text("def share(example, output):\n    return float('nan') if output else 0\n")
    with pytest.raises(UserError, match=r"gave nan for .*\.jsonl line \d+ with the text '\w+"):
        train(config)


# Tasks whose answers are text

SQUAD = {"id": "1", "title": "film", "context": "the film was great", "question": "was the film good"}


def test_squad_is_judged_by_text_and_keeps_the_best_f1(config, write, capsys):
    words = ("great", "good", "nice", "poor", "film", "story")
    rows = [{**SQUAD, "answers": {"text": [w, "story acting"], "answer_start": [0, 0]}} for w in words * 2]
    changed = config.replace(
        task="squad", train_file=write("squad", rows), dev_file=write("dev", rows), objective="auto", reward="",
        test_file=write("test", rows), prompt="{title} {context} {question} is", steps=20,
    )  # fmt: skip
    result = train(changed)
    dev = {row["step"]: row for row in result["dev"]}
    assert dev[result["best_step"]]["f1"] == max(row["f1"] for row in dev.values())
    assert set(result["test"]["after"]) == {"accuracy", "loss", "f1", "auc", "exact_match"}
    assert best_by(changed.replace(objective="lm_cross_entropy", generate="on").method) == (1, "f1")
    scored = evaluate(changed.replace(objective="auto"), Path(config.machine.output_dir) / "adapter")
    assert scored["test"] == pytest.approx(result["test"]["after"], abs=1e-6)
    assert main(["eval", config.machine.output_dir]) == 0
    assert "exact match" in capsys.readouterr().out
    labels = [row[0] for row in tables.tables(config.machine.output_dir)["before, after"]]
    assert "test exact_match" in labels
    off = changed.replace(generate="off", output_dir=config.machine.output_dir + "-off", steps=1)
    assert "exact_match" not in train(off)["test"]["after"]


def test_named_options_are_judged_by_the_best_reference():
    names, references = ("good", "The great film!", "story"), ("great film", "good")
    examples = [Example((3,), ((4,), (5,), (6,)), 0, references=references, names=names)] * 4
    scores = torch.eye(3)[[0, 1, 1, 2]]
    examples[2] = dataclasses.replace(examples[2], references=("film",))
    found = _of_named_options(scores, examples)
    # right as written; right once normalised; one word of two, P = 1/2 and R = 1; wrong
    assert found == {"accuracy": 1 / 4, "exact_match": 2 / 4, "f1": pytest.approx((1 + 1 + 2 / 3 + 0) / 4)}


def test_record_counts_every_right_name(config, write):
    """The chosen entity by hand: accuracy takes each right name, F1 and exact match the best of them."""
    row = {"passage": "the film was poor", "query": "It was @placeholder", "idx": 0}
    names = ["good", "great film", "story", "plot"]
    rows = [{**row, "entities": names, "answers": answers} for answers in (["great film", "good"], ["story"], ["film"])]
    changed = config.replace(
        task="record", train_file=write("record", rows), dev_file="", test_file=write("test", rows),
        objective="auto", reward="", prompt="{passage} and", steps=1,
    )  # fmt: skip
    after = train(changed)["test"]["after"]
    settled = changed.replace(objective="lm_cross_entropy")
    test, runtime = load_splits(settled, tokenizer())["test"], HFRuntime(*settled.for_runtime)
    runtime.prepare({"test": test})
    runtime.load(load_adapter(Path(config.machine.output_dir) / "adapter", runtime.spec.shapes))
    scores = runtime.score("test", range(3))
    chosen = [test[i].names[int(scores[i].argmax())] for i in range(3)]
    right = [name in references for name, references in zip(chosen, (e.references for e in test), strict=True)]
    assert after["accuracy"] == after["exact_match"] == sum(right) / 3
    assert after["f1"] >= after["exact_match"]
    assert test[0].references == ("great film", "good")


def test_the_run_says_what_it_cannot_do(config, tmp_path):
    masked = save("bert", tmp_path / "bert")
    shutil.copy(config.data.train_file, tmp_path / "again.jsonl")
    with pytest.raises(UserError, match="fills masks and generates no text"):
        train(
            config.replace(model=masked, prompt="{prompt}<mask>", target_modules=("query",), dev_file="", test_file="")
        )


def test_lora_a_is_calibrated_on_prompts_that_are_to_be_continued(config):
    config = config.replace(tuning="lora-b", lora_a="calibrated", r=4, steps=4, lr=0.01)
    assert train(config)["test"]["after"]["reward"] is not None
    for name, a in read_adapter(Path(config.machine.output_dir) / INITIAL).items():
        if name.endswith("lora_A.weight"):
            gram = a @ a.T
            assert torch.allclose(gram, gram.diagonal().diag(), atol=1e-4 * gram.max().item()), name
