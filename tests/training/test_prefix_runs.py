"""Runs of --tuning prefix: they learn, resume and replay to the bit, and leave an adapter that PEFT loads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from mezo.api import evaluate, resume, train, with_adapter_options
from mezo.cli.main import main
from mezo.config import Config
from mezo.errors import UserError
from mezo.models.load import load_tokenizer
from mezo.models.prefix import PROMPT
from mezo.run.adapter import load_adapter, read_adapter, same_bits
from mezo.run.directory import RunDirectory
from mezo.run.export import export
from mezo.run.header import INITIAL
from mezo.run.replay import rebuild
from mezo.run.trajectory import read_trajectory
from mezo.studies import tune
from mezo.studies.protocols import PROTOCOLS
from mezo.studies.reproduce import configs
from mezo.tasks import load_splits
from tests.tiny_models import save

LORA = ("target_modules", "layers_to_transform")


@pytest.fixture
def config(tiny_options):
    """40 steps of a prefix of 5 tokens."""
    options = {name: value for name, value in tiny_options.items() if name not in LORA}
    return Config.of(**{**options, "tuning": "prefix", "eps": 1e-1, "lr": 1e-2})


def log_of(config):
    return RunDirectory(Path(config.machine.output_dir)).trajectory.read_bytes()


def adapter_of(config):
    return read_adapter(Path(config.machine.output_dir) / "adapter")


def test_a_run_learns_and_its_adapter_is_pefts(config):
    result = train(config.replace(steps=700, batch_size=16, lr=1e-1, eval_every=100))
    assert result["test"]["before"]["accuracy"] < 0.7
    assert result["test"]["after"]["accuracy"] >= 0.85
    assert result["test"]["after"]["loss"] < 0.5 * result["test"]["before"]["loss"]
    run = Path(config.machine.output_dir)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model.base), run / "adapter").eval()
    right = []
    for example in load_splits(config, load_tokenizer(config.model.base))["test"]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.prompt])).logits[0, -1]
        right.append(int(logits[[option[0] for option in example.options]].argmax()) == example.label)
    assert sum(right) / len(right) == result["test"]["after"]["accuracy"]


def test_an_encoder_learns(tmp_path, tiny_data):
    model = save("roberta", tmp_path / "model")
    config = Config.of(
        **{"model": model, **tiny_data, "output_dir": str(tmp_path / "run"), "prompt": "{text} It was<mask> ."},
        **{"label_words": (" terrible", " great"), "tuning": "prefix", "eps": 1e-1, "lr": 3e-1},
        **{"steps": 600, "batch_size": 16, "eval_every": 100},
    )
    result = train(config)
    assert result["test"]["after"]["loss"] < 0.9 * result["test"]["before"]["loss"]
    peft = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert peft["task_type"] == "FEATURE_EXTRACTION"
    PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(model), tmp_path / "run/adapter")


@pytest.mark.parametrize("rule", ["sgd", "adam", "conservative"])
def test_a_stopped_run_resumes_to_the_bit_and_replays(config, rule):
    options = {"update_rule": rule, "num_perturbations": 1 if rule == "conservative" else 2}
    whole = config.replace(output_dir=config.machine.output_dir + "-whole", **options)
    train(whole)
    stopped = config.replace(**options)
    assert train(stopped, until=17) is None
    resume(stopped.machine.output_dir)
    assert log_of(stopped) == log_of(whole)
    assert same_bits(adapter_of(stopped), adapter_of(whole)) is None
    last, _, steps = rebuild(stopped.machine.output_dir, "last")
    assert steps == 40
    assert same_bits(last, rebuild(stopped.machine.output_dir, "last", "reference")[0]) is None
    assert same_bits(rebuild(stopped.machine.output_dir)[0], adapter_of(whole)) is None
    assert "checked_steps" in resume(stopped.machine.output_dir)


def test_theta_0_is_in_the_run_so_that_replay_needs_no_model(config, tmp_path):
    moved = str(tmp_path / "model")
    shutil.copytree(config.model.base, moved)
    config = config.replace(model=moved)
    train(config)
    run = Path(config.machine.output_dir)
    first, _ = read_trajectory(run / "trajectory.jsonl")
    assert first["init"]["kind"] == "file"
    assert first["version"] == 1
    theta = load_adapter(run / INITIAL, {PROMPT: (5, 96)})
    other = config.replace(output_dir=config.machine.output_dir + "-other", seed=1, steps=1)
    train(other)
    assert not torch.equal(read_adapter(Path(other.machine.output_dir) / INITIAL)[PROMPT], theta[PROMPT])
    shutil.rmtree(moved)
    assert main(["replay", str(run), "--output-dir", str(tmp_path / "again"), "--until", "0"]) == 0
    assert same_bits(read_adapter(tmp_path / "again"), theta) is None
    data = bytearray((run / INITIAL).read_bytes())
    data[-1] ^= 1
    (run / INITIAL).write_bytes(data)
    with pytest.raises(UserError, match="is missing or differs"):
        rebuild(run)


def test_a_run_goes_on_from_its_adapter_and_is_scored_alone(config, capsys):
    train(config)
    adapter = f"{config.machine.output_dir}/adapter"
    given = {name: value for name, value in config.changes().items() if name != "tuning"}
    plain = Config.of(**given | {"steps": 1, "adapter": adapter, "output_dir": config.machine.output_dir + "2"})
    before = train(plain)["test"]["before"]
    assert RunDirectory(Path(plain.machine.output_dir)).read_config().model.tuning.name == "prefix"
    assert before == evaluate(config, Path(adapter))["test"]
    assert main(["eval", config.machine.output_dir]) == 0
    assert f"{before['loss']:.4f}" in capsys.readouterr().out
    data = [
        "--test-file",
        config.data.test_file,
        "--prompt",
        config.data.prompt,
        "--label-words",
        *config.data.label_words,
    ]
    assert main(["eval", adapter, *data]) == 0
    assert f"{before['loss']:.4f}" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--num-prefix-tokens 6 contradicts --adapter .*, which has 5: leave it out"):
        with_adapter_options(config.replace(num_prefix_tokens=6, adapter=adapter))
    with pytest.raises(UserError, match=r"--tuning lora contradicts --adapter .*, which has prefix: leave it out"):
        with_adapter_options(config.replace(tuning="lora", r=4, adapter=adapter))
    with pytest.raises(
        UserError, match=r"--r 8 belongs to --tuning lora, lora-b or lora-xs, and this run has --tuning prefix"
    ):
        with_adapter_options(plain.replace(r=8))


def test_an_adapter_of_pefts_own_is_a_start(config, tmp_path):
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(config.model.base)
    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.save_pretrained(tmp_path / "theirs")
    started = config.replace(adapter=str(tmp_path / "theirs"), steps=1)
    train(started)
    start = read_adapter(Path(config.machine.output_dir) / INITIAL)[PROMPT]
    assert torch.equal(start, model.prompt_encoder["default"].embedding.weight)


def test_a_prefix_is_exported_as_an_adapter_alone(config, tmp_path):
    train(config.replace(steps=2))
    export(config.machine.output_dir, str(tmp_path / "peft"))
    assert same_bits(read_adapter(tmp_path / "peft"), adapter_of(config)) is None
    for form in ("merged", "sglang"):
        with pytest.raises(UserError, match=f"--format {form}: the adapter is a prefix.*use peft"):
            export(config.machine.output_dir, str(tmp_path / form), form)
        assert not (tmp_path / form).exists()


def test_instruments_and_gradient_look_at_a_prefix(config):
    result = train(config.replace(true_gradient=True, steps=10, eps=1e-2))
    assert result["projected_grad_noise"] == 0  # the same rows in the same batch
    rows = RunDirectory(Path(config.machine.output_dir)).read_metrics()
    for row in (row for row in rows if row["split"] == "gradient"):
        assert row["expected_cosine"] == pytest.approx((1 / 482) ** 0.5)
        assert row["projected_grad_error"] < 1e-2  # of a finite eps


def test_trials_of_a_sweep_start_from_one_prefix(config):
    found = tune.tune(config, grid_lr=(1e-2, 1e-3), grid_eps=(1e-1,), rungs=1, trial_steps=2)
    starts = [path.read_bytes() for path in Path(config.machine.output_dir).glob(f"*/{INITIAL}")]
    assert len(starts) == 2
    assert starts[0] == starts[1]
    assert "--tuning prefix" in found["command"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 4}, "--r 4 belongs to --tuning lora, lora-b or lora-xs, and this run has --tuning prefix: leave it out"),
        ({"target_modules": ("q_proj",)}, "--target-modules q_proj belongs to --tuning lora"),
        ({"layers_to_transform": (2,)}, "--layers-to-transform 2 belongs to --tuning lora"),
        ({"runtime": "sglang"}, "--tuning prefix: .*use --runtime hf"),
        ({"head": "linear", "label_words": ("a", "b")}, "--head linear belongs to --tuning lora"),
        ({"trunk_cache": "cpu"}, "--trunk-cache cpu: --tuning prefix trains every layer; use auto or off"),
        ({"num_prefix_tokens": 0}, "--num-prefix-tokens must be at least 1, got 0"),
        ({"tuning": "lora", "num_prefix_tokens": 3}, "--num-prefix-tokens 3 belongs to --tuning prefix"),
    ],
)
def test_what_a_prefix_cannot_be_is_refused(config, changes, message):
    with pytest.raises(UserError, match=message):
        config.replace(**changes)


def test_a_model_has_no_prefix_to_score(config):
    with pytest.raises(UserError, match="there is no prefix to score; leave it out"):
        evaluate(config, None)


def test_the_published_runs_are_those_of_the_paper():
    masked, text = (configs(PROTOCOLS[f"{n}-prefix"], "unused", {})[0] for n in ("roberta-mnli-k512", "opt13b-drop"))
    assert [config.method.lr for config in masked] == [1e-2, 5e-3, 1e-3]
    assert [config.method.lr for config in text] == [5e-2, 1e-2, 5e-3]
    for config in (*masked, *text):
        assert (
            config.model.tuning.name,
            config.model.tuning.num_prefix_tokens,
            config.method.eps,
            config.method.weight_decay,
        ) == ("prefix", 5, 0.1, 0.0)
    assert (PROTOCOLS["roberta-mnli-k512-prefix"].mean, PROTOCOLS["opt13b-rte-prefix"].mean) == (79.8, 70.8)
    assert PROTOCOLS["opt13b-squad"].lrs == (1e-4, 5e-5, 1e-5)
