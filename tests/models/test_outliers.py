"""--layers-to-transform auto: which layer, on a model whose outlier is planted, and what a run makes of it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mezo.api import resume, train
from mezo.cli.main import main
from mezo.config import Config
from mezo.errors import UserError
from mezo.models.load import Checkpoint
from mezo.models.outliers import TEXT, first_outlier
from mezo.run.adapter import read_adapter
from mezo.run.trajectory import read_header
from tests.tiny_data import flags_of


@pytest.fixture(scope="module")
def planted(tiny_model, tmp_path_factory):
    """The tiny model with a huge output in one dimension, from layer 1 on."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[5] = 1e5
    path = tmp_path_factory.mktemp("planted") / "model"
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(path)
    return str(path)


@pytest.fixture
def options(tiny_options, planted):
    return tiny_options | {"model": planted, "layers_to_transform": ("auto",), "steps": 4, "eval_every": 2}


def test_the_first_layer_with_an_outlier_is_chosen(planted):
    layer, ratios = first_outlier(Checkpoint.of(planted))
    assert layer == 1
    model = AutoModelForCausalLM.from_pretrained(planted).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(planted)(TEXT)["input_ids"]])
    with torch.no_grad():
        outputs = model(input_ids=ids, output_hidden_states=True).hidden_states[1:3]
    for out, ratio in zip(outputs, ratios, strict=False):
        assert ratio == pytest.approx((out.abs().max() / out.abs().median()).item(), rel=1e-4)
    assert ratios[0] < 1000 < ratios[1]


def test_a_run_has_the_layer_in_its_files_and_does_not_choose_again(options, monkeypatch, caplog):
    with caplog.at_level("INFO"):
        assert train(Config.of(**options), until=2) is None
    assert "layer 1 has the first activation outlier" in caplog.text
    run = Path(options["output_dir"])
    assert json.loads((run / "config.json").read_text())["layers_to_transform"] == [1]
    assert read_header(run / "trajectory.jsonl")["peft"]["layers_to_transform"] == [1]
    monkeypatch.setattr("mezo.models.outliers.first_outlier", lambda checkpoint: pytest.fail("chosen again"))
    assert resume(str(run))["steps"] == 4
    assert all(".layers.1." in name for name in read_adapter(run / "adapter"))


def test_a_model_without_an_outlier_is_refused(tiny_options):
    config = Config.of(**tiny_options | {"layers_to_transform": ("auto",)})
    with pytest.raises(UserError, match=r"has no layer with an activation above 100 and 1000 times the median \(at"):
        train(config)
    assert not Path(tiny_options["output_dir"]).exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("auto", 1), "--layers-to-transform auto 1: give auto alone, or numbers"),
        (("first",), "layers_to_transform must be a whole number, got 'first'"),
    ],
)
def test_other_words_are_refused(options, given, message):
    with pytest.raises(UserError, match=message):
        Config.of(**options | {"layers_to_transform": given})


def test_the_command_takes_numbers_and_auto(options, capsys):
    assert main(["train", *flags_of(options | {"layers_to_transform": ("firs",)})]) == 2
    assert "expected a number or auto, got 'firs'" in capsys.readouterr().err
    assert main(["train", *flags_of(options | {"steps": 1})]) == 0
    assert json.loads(Path(options["output_dir"], "config.json").read_text())["layers_to_transform"] == [1]
