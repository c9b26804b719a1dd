"""The head for classes that transformers gives a model: trained beside an adapter, loaded by PEFT as SEQ_CLS."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from mezo.api import evaluate, replay, resume, train
from mezo.cli.main import main
from mezo.config import Config
from mezo.errors import UserError
from mezo.models.load import checkpoint_hash, load_tokenizer
from mezo.run.adapter import read_adapter, read_peft_config, same_bits
from mezo.run.directory import RunDirectory
from mezo.run.export import export
from mezo.run.header import INITIAL
from mezo.run.trajectory import read_trajectory
from mezo.tasks import load_splits
from tests import tiny_families
from tests.tiny_models import save

EXACT = 1e-5  # of log-probabilities in float32
HEADS = {
    "llama": ["score.weight"],
    "bert": ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"],
}


@pytest.fixture(scope="module", params=list(HEADS))
def family(request, tmp_path_factory):
    return request.param, save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def config(family, tiny_data, tmp_path):
    """Labels are numbers, and there are no words for them."""
    return Config.of(
        model=family[1],
        **{name: path for name, path in tiny_data.items() if name.endswith("_file")},
        prompt="{text}",
        output_dir=str(tmp_path / "run"),
        head="classification",
        layers_to_transform=(1, 2),
        steps=200,
        batch_size=16,
        lr=1e-2,
        eps=1e-2,
        eval_every=50,
        report=False,
    )


@torch.no_grad()
def log_probs(model, examples):
    """By transformers and PEFT alone, one text at a time."""
    return torch.stack([model(torch.tensor([e.prompt])).logits[0].double().log_softmax(-1) for e in examples])


def of_peft(path, adapter, classes=2):
    return PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(path, num_labels=classes), str(adapter)
    ).eval()


def test_a_run_trains_the_head_and_its_adapter_is_pefts(family, config):
    result = train(config)
    assert result["test"]["before"]["loss"] == pytest.approx(torch.tensor(2.0).log().item())  # outputs of zeros
    assert result["test"]["after"]["accuracy"] >= 0.8
    run = RunDirectory.open(config.machine.output_dir)
    run.release()
    first, _ = read_trajectory(run.trajectory)
    trained = [name for name in first["shapes"] if "lora" not in name]
    assert sorted(trained) == sorted(f"base_model.model.{name}" for name in HEADS[family[0]])
    assert read_peft_config(run.adapter)["task_type"] == "SEQ_CLS"
    test = load_splits(config, load_tokenizer(family[1]))["test"]
    own = log_probs(of_peft(family[1], run.adapter), test)
    right = sum(int(row.argmax()) == example.label for row, example in zip(own, test, strict=True)) / len(test)
    assert right == result["test"]["after"]["accuracy"]
    loss = -own[range(len(test)), [example.label for example in test]].mean().item()
    assert loss == pytest.approx(result["test"]["after"]["loss"], abs=EXACT)


def test_a_run_replays_resumes_and_goes_on_from_its_adapter(family, config, tmp_path, capsys):
    whole, cut = config.replace(steps=20, eval_every=10), config.replace(steps=20, eval_every=10)
    train(whole)
    cut = cut.replace(output_dir=str(tmp_path / "cut"))
    assert train(cut, until=7) is None
    resume(cut.machine.output_dir)
    kept = Path(whole.machine.output_dir)
    for other in ("trajectory.jsonl", INITIAL):
        assert (kept / other).read_bytes() == (tmp_path / "cut" / other).read_bytes()
    replay(str(kept), str(tmp_path / "again"))
    for other in (tmp_path / "cut" / "adapter", tmp_path / "again"):
        assert same_bits(read_adapter(kept / "adapter"), read_adapter(other)) is None
    own = evaluate(whole, kept / "adapter")
    on = train(whole.replace(steps=1, adapter=str(kept / "adapter"), output_dir=str(tmp_path / "on")))
    assert on["test"]["before"]["loss"] == pytest.approx(own["test"]["loss"], abs=EXACT)
    assert main(["eval", str(kept)]) == 0
    assert f"{own['test']['accuracy']:.4f}" in capsys.readouterr().out


def test_a_checkpoint_that_has_a_head_keeps_it(family, config, tmp_path):
    path = str(tmp_path / "classifier")
    torch.manual_seed(1)
    classifier = AutoModelForSequenceClassification.from_pretrained(family[1], num_labels=2)
    classifier.save_pretrained(path)
    load_tokenizer(family[1]).save_pretrained(path)
    test = load_splits(config, load_tokenizer(path))["test"]
    labels = [example.label for example in test]
    scored = evaluate(config.replace(model=path), None)["test"]
    loss = -log_probs(classifier.eval(), test)[range(len(test)), labels].mean()
    assert scored["loss"] == pytest.approx(float(loss), abs=EXACT)
    result = train(config.replace(model=path, steps=2))
    assert result["test"]["before"]["loss"] == pytest.approx(scored["loss"], abs=EXACT)
    with pytest.raises(UserError, match=r"is a \w+ForSequenceClassification: give --head classification"):
        train(config.replace(model=path, head="model", label_words=(" bad", " good"), output_dir=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()
    hashes = {checkpoint_hash(each, "float32", "classification") for each in (path, path)}
    assert len(hashes) == 1


def test_an_adapter_of_peft_goes_on(family, config, tmp_path):
    path, data = family[1], load_splits(config, load_tokenizer(family[1]))["test"]
    if family[0] == "bert":  # PEFT leaves the pooler alone, so there has to be one
        path = str(tmp_path / "classifier")
        AutoModelForSequenceClassification.from_pretrained(family[1], num_labels=2).save_pretrained(path)
        load_tokenizer(family[1]).save_pretrained(path)
    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    targets = ["q_proj"] if family[0] == "llama" else ["query"]
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=targets, r=4, init_lora_weights=False))
    model.eval().save_pretrained(tmp_path / "adapter")
    own = log_probs(model, data)
    expected = -own[range(len(data)), [example.label for example in data]].mean().item()
    given = Config.of(**{**config.to_dict(), "model": path, "steps": 1, "output_dir": str(tmp_path / "on")} | {
        "adapter": str(tmp_path / "adapter"), "layers_to_transform": (), "target_modules": tuple(targets), "r": 4,
        "lora_alpha": 8,
    })  # fmt: skip
    assert train(given)["test"]["before"]["loss"] == pytest.approx(expected, abs=EXACT)


def test_merged_it_is_a_classifier_that_needs_no_adapter(family, config, tmp_path):
    torch.manual_seed(1)
    path = str(tmp_path / "three")  # the head that is trained has two classes
    AutoModelForSequenceClassification.from_pretrained(family[1], num_labels=3).save_pretrained(path)
    load_tokenizer(family[1]).save_pretrained(path)
    train(config.replace(model=path, steps=5))
    export(config.machine.output_dir, str(tmp_path / "merged"), "merged")
    test = load_splits(config, load_tokenizer(path))["test"]
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    adapter = Path(config.machine.output_dir) / "adapter"
    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, ignore_mismatched_sizes=True)
    own = log_probs(PeftModel.from_pretrained(base, str(adapter)).eval(), test)
    assert (log_probs(merged, test) - own).abs().max() < EXACT
    assert own.std() > 1e-4  # outputs began as zeros
    with pytest.raises(UserError, match="--format sglang: the adapter has a classification head"):
        export(config.machine.output_dir, str(tmp_path / "sglang"), "sglang")


def test_a_head_of_other_classes_is_made_anew(family, config, tmp_path):
    path = str(tmp_path / "three")
    AutoModelForSequenceClassification.from_pretrained(family[1], num_labels=3).save_pretrained(path)
    load_tokenizer(family[1]).save_pretrained(path)
    result = train(config.replace(model=path, steps=1))
    assert result["test"]["before"]["loss"] == pytest.approx(torch.tensor(2.0).log().item())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runtime": "sglang"}, "use --runtime hf"),
        ({"objective": "lm_cross_entropy"}, "--objective must be"),
        ({"task": "sst2", "prompt": ""}, "give --prompt"),
        ({"generate": "on"}, "leave --generate out"),
    ],
)
def test_what_a_head_for_classes_cannot_do_is_refused(config, changes, message):
    with pytest.raises(UserError, match=f"--head classification.*{message}"):
        config.replace(**changes)


@pytest.mark.parametrize(
    ("name", "why"), [("t5", "an encoder with a decoder"), ("granite", "no such head for granite")]
)
def test_a_family_without_such_a_head_is_refused(name, why, config, tmp_path):
    path = tiny_families.save(name, tmp_path / "model")
    with pytest.raises(UserError, match=why):
        train(config.replace(model=path))
    assert not Path(config.machine.output_dir).exists()


def test_words_are_not_asked_for_but_kept(config):
    assert json.loads(config.to_json())["label_words"] == []
    assert config.replace(label_words=("bad", "good")).data.label_words == ("bad", "good")
