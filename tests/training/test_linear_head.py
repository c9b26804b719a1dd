"""A linear head over the mean of an encoder's hidden states: exact with and without the trunk, loaded by PEFT."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel

from mezo.api import evaluate, resume, train
from mezo.cli.main import main
from mezo.config import Config
from mezo.errors import UserError
from mezo.models.load import load_tokenizer
from mezo.run.directory import RunDirectory
from mezo.run.export import export
from mezo.run.trajectory import read_trajectory
from mezo.runtimes.hf.runtime import HFRuntime
from mezo.tasks import load_splits
from mezo_kernels import lora_init
from tests.tiny_models import ENCODERS, save

ROUNDING = 2e-5  # float32; batches are shaped differently, so sums are ordered differently


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request, tmp_path_factory):
    return save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def config(encoder, tiny_data, tmp_path):
    return Config.of(
        model=encoder,
        **tiny_data,
        output_dir=str(tmp_path / "run"),
        head="linear",
        label_words=("bad", "good"),
        layers_to_transform=(1, 2),
        steps=400,
        batch_size=16,
        lr=5e-3,
        eps=1e-2,
        eval_every=50,
    )


def pooled_logits(model, head, example):
    """By transformers alone, one sentence at a time."""
    out = model(input_ids=torch.tensor([example.prompt])).last_hidden_state
    return head(out[0].mean(0))


@pytest.mark.parametrize("cache", ["auto", "off"])
@torch.no_grad()
def test_scores_are_the_head_on_the_mean_hidden_state(config, cache):
    splits = load_splits(config, load_tokenizer(config.model.base))
    runtime = HFRuntime(*config.replace(trunk_cache=cache).for_runtime)
    runtime.prepare(splits)
    assert (runtime.scorer.trunk is None) == (cache == "off")
    theta = {name: lora_init(3, name, shape) for name, shape in runtime.spec.shapes.items()}
    runtime.load(theta)
    got = runtime.score("train", range(8))
    head = torch.nn.Linear(32, 2, bias=False)
    head.weight.copy_(theta["base_model.model.score.weight"])
    want = torch.stack([pooled_logits(runtime.parts.model, head, example) for example in splits["train"][:8]])
    assert (got - want).abs().max() < ROUNDING
    assert want.std() > 1e-2


def test_a_run_trains_the_head_and_its_adapter_is_pefts(config):
    result = train(config)
    assert result["test"]["before"]["accuracy"] == 0.5  # a head of zeros
    assert result["test"]["after"]["accuracy"] >= 0.8
    run = RunDirectory.open(config.machine.output_dir)
    run.release()
    first, _ = read_trajectory(run.trajectory)
    assert first["shapes"]["base_model.model.score.weight"] == [2, 32]
    assert resume(config.machine.output_dir)["checked_steps"] == result["best_step"]
    base = AutoModel.from_pretrained(config.model.base).eval()
    base.score = torch.nn.Linear(32, 2, bias=False)
    model = PeftModel.from_pretrained(base, run.adapter).eval()
    test = load_splits(config, load_tokenizer(config.model.base))["test"]
    with torch.no_grad():
        guesses = [int(pooled_logits(model, model.get_base_model().score, e).argmax()) for e in test]
    right = sum(guess == e.label for guess, e in zip(guesses, test, strict=True)) / len(test)
    assert right == result["test"]["after"]["accuracy"]


def test_a_run_goes_on_from_its_adapter_and_is_scored_alone(config, capsys):
    train(config.replace(steps=20))
    adapter = f"{config.machine.output_dir}/adapter"
    before = train(config.replace(steps=1, adapter=adapter, output_dir=config.machine.output_dir + "2"))
    own = evaluate(config, Path(adapter))
    assert before["test"]["before"]["loss"] == pytest.approx(own["test"]["loss"], abs=ROUNDING)
    assert main(["eval", config.machine.output_dir]) == 0
    assert f"{own['test']['accuracy']:.4f}" in capsys.readouterr().out
    with pytest.raises(UserError, match="linear head"):
        export(config.machine.output_dir, config.machine.output_dir + "4", "merged")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runtime": "sglang"}, "use --runtime hf"),
        ({"objective": "lm_cross_entropy"}, "--objective must be"),
        ({"task": "sst2"}, "give --prompt"),
        ({"generate": "on"}, "leave --generate out"),
        ({"num_demonstrations": 2}, "leave --num-demonstrations out"),
    ],
)
def test_what_a_linear_head_cannot_do_is_refused(config, changes, message):
    with pytest.raises(UserError, match=message):
        config.replace(**changes)


def test_a_mask_or_a_decoder_is_refused(config, tiny_model):
    with pytest.raises(UserError, match="reads no mask"):
        train(config.replace(prompt="{text} It was<mask>."))
    with pytest.raises(UserError, match="not an encoder"):
        train(config.replace(model=tiny_model))
