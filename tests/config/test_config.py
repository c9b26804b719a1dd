"""Options: whose they are, given or default, what a run wrote before, and where a new one comes from."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Annotated

import pytest
import yaml

from mezo.cli import train
from mezo.cli.main import main
from mezo.cli.parsing import given
from mezo.config import Config, Data, Lora, Machine
from mezo.errors import UserError
from mezo.ranges import AtLeastOne
from mezo.run.directory import RunDirectory

RUN = {"model": "m", "output_dir": "o", "task": "sst2"}
STRANGERS = {
    "momentum": (["--momentum", "0.9"], "--momentum 0.9 belongs to --update-rule momentum"),
    "beta1": (["--update-rule", "sign", "--beta1", "0.9"], "--beta1 0.9 belongs to --update-rule adam"),
    "rank": (
        ["--tuning", "full", "--r", "8"],
        "--r 8 belongs to --tuning lora, lora-b or lora-xs, and this run has --tuning full",
    ),
    "ranks": (["--runtime", "hf", "--tp", "1"], "--tp 1 belongs to --runtime sglang, and this run has --runtime hf"),
    "trunk": (["--runtime", "sglang", "--trunk-cache", "auto"], "--trunk-cache auto belongs to --runtime hf"),
    "prefix": (["--num-prefix-tokens", "5"], "--num-prefix-tokens 5 belongs to --tuning prefix"),
    "adapter": (["--tuning", "full", "--adapter", "a"], "--adapter a belongs to --tuning lora or prefix"),
    "head": (["--tuning", "prefix", "--head", "model"], "--head model belongs to --tuning lora"),
}


@pytest.mark.parametrize("name", list(STRANGERS))
def test_an_option_of_something_else_is_refused_even_with_its_default(name, as_flags, capsys):
    flags, message = STRANGERS[name]
    assert main(["train", *as_flags(RUN), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert ": leave it out, or choose --" in line


def test_yaml_is_given_too(tmp_path, as_flags, capsys):
    (tmp_path / "run.yaml").write_text("tuning: full\nr: 8\n")
    assert main(["train", *as_flags(RUN), "--config", str(tmp_path / "run.yaml")]) == 2
    assert "--r 8 belongs to --tuning lora" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("r", "8"), ("head", "model"), ("tuning", "lora")])
def test_what_an_adapter_fixes_is_compared_with_what_is_given(tiny_options, as_flags, tmp_path, name, value, capfd):
    assert main(["train", *as_flags({**tiny_options, "steps": 1, "r": 16})]) == 0
    rest = {k: v for k, v in tiny_options.items() if k not in ("target_modules", "layers_to_transform")}
    flags = {**rest, "output_dir": str(tmp_path / "on"), "adapter": f"{tiny_options['output_dir']}/adapter", "steps": 1}
    contradicts = name == "r"
    assert main(["train", *as_flags({**flags, name: value})]) == (2 if contradicts else 0)
    assert (f"--{name} {value} contradicts --adapter" in capfd.readouterr().err) is contradicts
    assert (tmp_path / "on").exists() is not contradicts


EVERY_OLD_OPTION = {option.name: option.default for option in Config.options().values()}


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"update_rule": "adam", "beta1": 0.5},
        {"tuning": "full"},
        {"tuning": "prefix", "num_prefix_tokens": 3},
        {"runtime": "sglang", "tp": 2},
        {"runtime": "sglang", "trunk_cache": "off", "trunk_cache_bytes": 7},
    ],
    ids=str,
)
def test_a_config_json_with_every_option_is_read(chosen, tmp_path):
    """As programs wrote it that had one list of options; a runtime's idle options never said what is computed."""
    saved = {**EVERY_OLD_OPTION, **RUN, **chosen}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    idle = ("trunk_cache", "trunk_cache_bytes")
    new = {name: value for name, value in chosen.items() if name not in idle}
    assert RunDirectory(tmp_path).read_config() == Config.of(**RUN, **new)


def test_a_config_json_that_contradicts_itself_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**EVERY_OLD_OPTION, **RUN, "tuning": "full", "r": 4}))
    with pytest.raises(UserError, match="--r 4 belongs to --tuning lora"):
        RunDirectory(tmp_path).read_config()


@pytest.mark.parametrize("change", [{}, {"tuning": "full"}, {"runtime": "sglang", "tp": 2}, {"update_rule": "sign"}])
def test_config_json_gives_the_same_configuration(change, tmp_path):
    config = Config.of(**RUN, label_words=(" a", " b"), layers_to_transform=(1, 2)).replace(**change)
    (tmp_path / "config.json").write_text(config.to_json())
    assert RunDirectory(tmp_path).read_config() == config


def test_another_tuning_leaves_the_options_of_the_former_behind():
    config = Config.of(**RUN, r=4, steps=7)
    full = config.replace(tuning="full")
    assert ("r" in config.given, "r" in full.given, full.method.steps) == (True, False, 7)
    assert full.replace(tuning="lora").model.tuning == Lora()
    with pytest.raises(UserError, match="--r 4 belongs to --tuning lora"):
        config.replace(tuning="full", r=4)


@dataclass(frozen=True)
class ToyData(Data):
    """Data: with one more option."""

    toys: Annotated[int, AtLeastOne.__metadata__[0]] = 3
    """How many toys are played with."""


@dataclass(frozen=True)
class ToyConfig(Config):
    """A configuration whose first group has one more option."""

    data: ToyData


def test_a_new_option_is_one_field(tmp_path, capsys):
    """It is a flag, a key of YAML and config.json, and in --help, with its range."""
    options = ToyConfig.options()
    assert given(["--toys", "4"], "mezo train", train.Options, options) == {"toys": 4}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"toys": 5}))
    assert given(["--config", str(tmp_path / "run.yaml")], "mezo train", train.Options, options) == {"toys": 5}
    config = ToyConfig.of(**RUN, toys=6)
    assert json.loads(config.to_json())["toys"] == config.data.toys == 6
    assert ToyConfig.of_run(json.loads(config.to_json())) == config
    with pytest.raises(SystemExit):
        given(["--help"], "mezo train", train.Options, options)
    assert "--toys INT How many toys are played with. (default: 3)" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match="--toys must be at least 1, got 0"):
        ToyConfig.of(**RUN, toys=0)
    with pytest.raises(UserError, match="unknown configuration key 'toys'"):
        Config.of(**RUN, toys=6)


def test_help_has_every_option_in_its_section(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    titles = [line.rstrip(":") for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Command", "Data", "Model", "Method", "Objective", "Schedule", "Evaluation", "Machine", "Engine"]
    missing = [o.flag for o in Config.options().values() if f"\n  {o.flag}" not in out or not o.text]
    assert not missing
    words = " ".join(out.split())
    assert words.startswith("usage: mezo train --model MODEL --output-dir OUTPUT_DIR [options]")
    assert words.count("(required)") == 2
    assert "Belongs to --update-rule adam, adamw or subspace-adam. (default: 0.999)" in words


def test_a_mistyped_flag_brings_the_nearest(capsys):
    assert main(["train", "--stepz", "3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "unrecognized arguments: --stepz 3; did you mean --steps?" in line


def test_groups_are_frozen_and_hold_every_field():
    config = Config.of(**RUN)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.machine.device = "cuda"
    assert config.machine == Machine(output_dir="o")
