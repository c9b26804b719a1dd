"""The command line: good calls work, mistakes are one line with a remedy, exit code 2 and nothing written."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import mezo_kernels.reference
from mezo.cli.main import COMMANDS, main
from mezo.config import Config
from mezo.config.presets import PRESETS


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


MISTAKES = {
    "equal label words": ({"label_words": (" great", " great")}, "--label-words must differ"),
    "one label word": ({"label_words": (" great",)}, "--label-words needs at least two words"),
    "eps 0": ({"eps": 0.0}, "--eps must be a float32 number above 0, got 0.0"),
    "lr nan": ({"lr": float("nan")}, "--lr must be a float32 number above 0, got nan"),
    "no steps": ({"steps": 0}, "--steps must be at least 1, got 0"),
    "unknown module": ({"target_modules": ("q_proj", "w_proj")}, "--target-modules: no linear layer named w_proj"),
    "unknown layer": ({"layers_to_transform": (7,)}, "layer 7 does not exist; the model has layers 0 to 2"),
    "no such file": ({"train_file": "gone.jsonl"}, "--train-file: no such file: gone.jsonl"),
    "no such model": ({"model": "./gone"}, "--model ./gone: no such directory; give one with a model in it, or a hub"),
    "no label words": (
        {"prompt": "", "label_words": ()},
        "the labels in the column 'label' are numbers: give --label-words, the word of each in order",
    ),
    "too many shots": ({"k_shot": 40}, "k_shot asks for 40"),
    "field not in data": ({"prompt": "{sentence} It was"}, "sentence"),
    "both limits": ({"k_shot": 2, "num_train": 4}, "--k-shot and --num-train exclude each other"),
    "prompt without a field": ({"prompt": "It was"}, "takes no field, so every example would be the same"),
    "eps below float32": ({"eps": 1e-50}, "--eps must be a float32 number above 0, got 1e-50"),
    "micro-batch": ({"micro_batch_size": 9}, "--micro-batch-size must be at most --batch-size, 8; got 9"),
    "no such adapter": ({"adapter": "./gone"}, "./gone is neither a run nor an adapter"),
    "no such device": ({"device": "gpu"}, "--device must be cpu, cuda or cuda:N, got gpu"),
    "neither task nor file": (
        {"train_file": "", "dev_file": "", "test_file": ""},
        "--task and --train-file are missing",
    ),
    "no such task": ({"task": "nonsense", "train_file": "", "dev_file": "", "test_file": ""}, "nonsense"),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_mistakes(mistake, tiny_options, as_flags, capfd):
    change, message = MISTAKES[mistake]
    options = {k: v for k, v in {**tiny_options, **change}.items() if v != ""}
    check_refused(as_flags(options), message, options["output_dir"], capfd)


def check_refused(argv, message, output_dir, capfd):
    assert main(["train", *argv]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("mezo: error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not Path(output_dir).exists()


DATA_MISTAKES = {
    "empty file": ([], "empty"),
    "label outside the words": ([{"text": "good", "label": 2}], "label"),
    "label is a word": ([{"text": "good", "label": "great"}], "label"),
    "no text": ([{"label": 1}], "text"),
    "class missing from k-shot": ([{"text": "good film", "label": 1}] * 4, "class 0"),
}


@pytest.mark.parametrize("mistake", list(DATA_MISTAKES))
def test_data_mistakes(mistake, tiny_options, as_flags, tmp_path, capfd):
    rows, message = DATA_MISTAKES[mistake]
    train = write(tmp_path / "bad.jsonl", rows)
    options = {**tiny_options, "train_file": train}
    if "k-shot" in mistake:
        options["k_shot"] = 2
    check_refused(as_flags(options), message, options["output_dir"], capfd)


def test_damaged_json_names_the_line(tiny_options, as_flags, tmp_path, capfd):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good", "label": 1}\n{"text": "bad", "label"\n')
    options = {**tiny_options, "train_file": str(path)}
    check_refused(as_flags(options), "2", options["output_dir"], capfd)


def test_existing_run_directory_is_refused_and_kept(tiny_options, as_flags, capfd):
    run = Path(tiny_options["output_dir"])
    run.mkdir()
    (run / "mine.txt").write_text("precious")
    assert main(["train", *as_flags(tiny_options)]) == 2
    assert "exists and is never overwritten: choose another, or use --resume" in capfd.readouterr().err
    assert [path.name for path in run.iterdir()] == ["mine.txt"]


def test_train_eval_replay_resume(tiny_options, as_flags, tmp_path, capfd):
    run = tiny_options["output_dir"]
    assert main(["train", *as_flags({**tiny_options, "steps": 10})]) == 0
    result = json.loads((Path(run) / "result.json").read_text())
    capfd.readouterr()
    assert main(["eval", run]) == 0
    assert f"{result['test']['after']['loss']:.4f}" in capfd.readouterr().out
    names = ("model", "train_file", "prompt", "label_words")
    assert main(["eval", f"{run}/adapter", *as_flags({k: tiny_options[k] for k in names})]) == 0
    assert main(["replay", run, "--output-dir", str(tmp_path / "again")]) == 0
    weights = "adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (Path(run) / "adapter" / weights).read_bytes()
    assert main(["replay", run, "--output-dir", str(tmp_path / "again")]) == 2
    assert main(["train", "--resume", run]) == 0
    assert main(["train", "--resume", run, "--steps", "10"]) == 0
    assert main(["train", "--resume", run, "--steps", "9"]) == 2
    assert "--steps 9: the run has 10; a larger number lengthens it" in capfd.readouterr().err
    assert main(["train", "--resume", run, "--steps", "20"]) == 0
    assert json.loads((Path(run) / "result.json").read_text())["steps"] == 20


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"adapter": "elsewhere"}, "--adapter elsewhere: mezo eval takes an adapter in front of its options"),
        ({"lora_alpha": 64}, "--lora-alpha 64 contradicts {target}, which has 16: leave it out"),
        ({"target_modules": ("q_proj",)}, "--target-modules q_proj contradicts {target}, which has"),
    ],
    ids=["adapter", "scale", "modules"],
)
def test_eval_refuses_what_its_adapter_is_not(tiny_options, as_flags, given, message, capfd):
    run = tiny_options["output_dir"]
    assert main(["train", *as_flags({**tiny_options, "steps": 2})]) == 0
    data = {k: tiny_options[k] for k in ("model", "train_file", "prompt", "label_words")}
    for target, options in ((f"{run}/adapter", data), (run, {})):
        assert main(["eval", target, *as_flags({**options, **given})]) == 2
        assert message.format(target=target) in capfd.readouterr().err
    modules = {"target_modules": tiny_options["target_modules"][::-1]}
    assert main(["eval", f"{run}/adapter", *as_flags({**data, **modules})]) == 0, "the same in another order"


@pytest.mark.parametrize("alpha", ["16", "64"], ids=["the default", "another"])
def test_a_scale_given_beside_an_adapter_is_never_ignored(tiny_options, as_flags, tmp_path, alpha, capfd):
    flags = {**tiny_options, "steps": 2}
    assert main(["train", *as_flags({**flags, "lora_alpha": 32})]) == 0
    modules = ("target_modules", "layers_to_transform", "output_dir")
    rest = as_flags({k: v for k, v in flags.items() if k not in modules})
    again = ["train", *rest, "--adapter", f"{tiny_options['output_dir']}/adapter", "--output-dir", str(tmp_path / "on")]
    assert main([*again, "--lora-alpha", alpha]) == 2
    assert f"--lora-alpha {alpha} contradicts --adapter" in capfd.readouterr().err
    (tmp_path / "options.yaml").write_text(f"lora_alpha: {alpha}\n")
    assert main([*again, "--config", str(tmp_path / "options.yaml")]) == 2
    assert not (tmp_path / "on").exists()
    assert main([*again, "--lora-alpha", "32"]) == 0


def test_eval_of_a_model_alone_takes_no_adapter_and_no_head(tiny_options, as_flags, capfd):
    data = {k: tiny_options[k] for k in ("model", "train_file", "label_words")}
    assert main(["eval", *as_flags({**data, "adapter": "x"})]) == 2
    assert "--adapter x: mezo eval takes an adapter in front of its options: mezo eval x" in capfd.readouterr().err
    assert main(["eval", *as_flags({**data, "head": "linear"})]) == 2
    assert "--head linear: without a run or an adapter the head is zero" in capfd.readouterr().err


def test_eval_without_an_adapter_and_with_demonstrations(tiny_options, as_flags, capfd):
    data = {k: tiny_options[k] for k in ("model", "train_file", "test_file", "prompt", "label_words")}
    assert main(["eval", *as_flags(data)]) == 0
    plain = capfd.readouterr().out
    assert "train" in plain
    assert main(["eval", *as_flags({**data, "num_demonstrations": 4})]) == 0
    shown = capfd.readouterr().out
    assert "train" not in shown
    test = [next(line for line in out.splitlines() if "test" in line) for out in (plain, shown)]
    assert test[0] != test[1]
    assert main(["train", *as_flags({**tiny_options, "num_demonstrations": 4})]) == 2
    assert "--num-demonstrations is for mezo eval" in capfd.readouterr().err
    assert not Path(tiny_options["output_dir"]).exists()


def test_a_tasks_objective_is_settled_in_the_run_directory(tiny_model, tiny_data, tmp_path, as_flags):
    choice = {"premise": "the film was good.", "choice1": "The plot was", "choice2": "A story", "idx": 0, "label": 0}
    rows = [{**choice, "question": question} for question in ("cause", "effect")] * 10
    options = {"model": tiny_model, "task": "copa", "train_file": write(tmp_path / "copa.jsonl", rows), "steps": 2}
    for name, given in {"auto": {}, "named": {"objective": "cross_entropy"}}.items():
        run = tmp_path / name
        assert main(["train", *as_flags({**options, **given, "output_dir": str(run)})]) == 0
        saved = json.loads((run / "config.json").read_text())
        assert saved["objective"] == given.get("objective", "lm_cross_entropy")
        assert main(["train", "--resume", str(run)]) == 0
        assert main(["eval", str(run)]) == 0


def test_tasks_are_listed(capsys):
    assert main(["tasks"]) == 0
    out = capsys.readouterr().out
    assert (
        """copa  (trains lm_cross_entropy, reports accuracy)
    continues    "{premise} {conjunction}"  each row's own options
"""
        in out
    )
    assert """    fills a mask "{statement}?<mask>, {continuation}"  ' Yes' ' Maybe' ' No'""" in out
    assert main(["tasks", "--all"]) == 2


def test_resume_of_no_run(tmp_path, capfd):
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "not a run directory" in capfd.readouterr().err


def test_config_file_with_flags_on_top(tiny_options, tmp_path, capfd):
    options = {**tiny_options, "steps": 4, "target_modules": ["q_proj"], "label_words": [" terrible", " great"]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--steps", "2"]) == 0
    saved = Config.of(**json.loads((Path(tiny_options["output_dir"]) / "config.json").read_text()))
    assert (saved.method.steps, saved.model.tuning.target_modules, saved.method.lr) == (
        2,
        ("q_proj",),
        tiny_options["lr"],
    )
    (tmp_path / "bad.yaml").write_text("stepz: 3\n")
    assert main(["train", "--config", str(tmp_path / "bad.yaml")]) == 2
    assert "unknown configuration key 'stepz'" in capfd.readouterr().err


YAML_MISTAKES = {
    "steps: many": "steps must be a whole number, got 'many'",
    "steps: 8.5": "steps must be a whole number, got 8.5",
    "lr: fast": "lr must be a number, got 'fast'",
    "objective: nonsense": "objective must be one of auto, cross_entropy, lm_cross_entropy, accuracy, f1, reward, or",
    "eval_train: maybe": "eval_train must be true or false, got 'maybe'",
    "prompt: 3": "prompt must be text, got 3",
}


@pytest.mark.parametrize("line", list(YAML_MISTAKES))
def test_yaml_values_are_checked(line, tmp_path, capfd):
    (tmp_path / "run.yaml").write_text(line)
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    assert YAML_MISTAKES[line] in capfd.readouterr().err


def test_yaml_means_what_it_looks_like(tmp_path):
    values = {"model": "m", "output_dir": "o", "task": "sst2", "lr": "1e-3", "layers_to_transform": 2, "eps": 1}
    config = Config.of(**values)
    assert (config.method.lr, config.model.tuning.layers_to_transform, config.method.eps) == (1e-3, (2,), 1.0)


@pytest.fixture
def without_triton(monkeypatch):
    """Its interpreter takes seconds, and `test_every_backend_of_this_machine_is_right` runs it."""
    monkeypatch.setattr(mezo_kernels.dispatch, "available_backends", lambda device: ["reference", "numba"])


def test_verify_on_this_machine(without_triton, capfd):
    assert main(["verify", "--device", "cpu"]) == 0
    assert "numba" in capfd.readouterr().out
    assert main(["verify", "--device", "nonsense"]) == 2


def test_verify_of_compiled_code_refuses_what_it_cannot_do(monkeypatch, capfd):
    assert main(["verify", "--compiled", "--device", "cpu"]) == 2
    assert "leave out the device, got cpu" in capfd.readouterr().err
    monkeypatch.setattr("triton.knobs.runtime.interpret", True)
    assert main(["verify", "--compiled"]) == 2
    assert "unset it" in capfd.readouterr().err


def test_verify_exit_code(without_triton, monkeypatch, capfd):
    """The reference itself is bent: every backend then disagrees with it."""
    draw = mezo_kernels.reference.standard_normal
    monkeypatch.setattr(mezo_kernels.reference, "standard_normal", lambda *arguments: draw(*arguments) + 1)
    assert main(["verify", "--device", "cpu"]) == 1
    assert "MISMATCH" in capfd.readouterr().out


@pytest.mark.parametrize("argv", [["--help"], []])
def test_usage(argv, capsys):
    assert main(argv) == (0 if argv else 2)
    assert "replay" in capsys.readouterr().out


def test_unknown_command(capsys):
    assert main(["trian"]) == 2
    error = capsys.readouterr().err
    assert "unknown command 'trian'" in error
    assert "did you mean train?" in error


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mezo {version('mezo-kernels')}\n"


COMMANDS_OF_ALL = [name for commands in COMMANDS.values() for name in commands]


@pytest.mark.parametrize("command", COMMANDS_OF_ALL)
def test_every_command_has_the_help_that_is_promised(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: mezo {command}")


@pytest.mark.parametrize(
    ("flag", "ours"), [("--learning-rate", "--lr"), ("--num_train_epochs=3", "--steps"), ("--stpes", "--steps")]
)
def test_flags_of_other_programs_are_known(flag, ours, capsys):
    assert main(["train", flag]) == 2
    assert f"did you mean {ours}?" in capsys.readouterr().err


def test_conversations_take_no_label_words(tiny_options, as_flags, tmp_path, capfd):
    path = write(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    options = {**tiny_options, "train_file": path}
    message = "has no column for the label, it has 'messages': name it with --label-column, or leave --label-words out"
    check_refused(as_flags(options), message, options["output_dir"], capfd)
    unused = dict.fromkeys(("prompt", "dev_file", "test_file"), "")
    options |= {**unused, "label_words": ()}
    check_refused(as_flags(options), "no chat template: give --chat-template", options["output_dir"], capfd)


def test_sigterm_and_sighup_end_a_command_with_an_exit_code_of_their_own(monkeypatch, capsys):
    for number, code in ((signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        put_away = []

        def command(argv, number=number, put_away=put_away):
            try:
                os.kill(os.getpid(), number)
                time.sleep(5)
            finally:
                put_away.append(True)

        monkeypatch.setattr("mezo.cli.tasks.main", command)
        signal.signal(number, signal.SIG_DFL)  # it is ignored where the tests run under nohup
        before = signal.getsignal(number)
        assert main(["tasks"]) == code
        assert put_away
        assert f"ended by {signal.Signals(number).name}" in capsys.readouterr().err
        assert signal.getsignal(number) is before


SWALLOWED = """
import ctypes, os, signal, time
from mezo.cli import main, tasks
@ctypes.CFUNCTYPE(None)
def callback():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
def command(argv):
    try:
        callback()
        time.sleep(60)
    finally:
        time.sleep(2.5 * main.AGAIN)  # what is put away is left in peace
        print("put away", flush=True)
tasks.main = command
raise SystemExit(main.main(["tasks"]))
"""


def test_an_exception_that_python_loses_is_raised_again():
    """A signal that comes in a callback of ctypes, as llvmlite makes them while numba compiles, goes to no caller."""
    done = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True, timeout=40)
    assert done.returncode == 143, done.stderr
    assert done.stdout == "put away\n"
    assert "Exception ignored on calling ctypes callback" in done.stderr
    assert "ended by SIGTERM" in done.stderr


LOST = """
import os, signal, time
from mezo.cli import main, tasks
def command(argv):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except SystemExit:
        time.sleep(60)
tasks.main, main.GRACE = command, 1
main.main(["tasks"])
"""


def test_a_command_that_loses_the_exception_is_killed_all_the_same():
    assert subprocess.run([sys.executable, "-c", LOST], timeout=30).returncode == -signal.SIGTERM


def test_an_ignored_sighup_stays_ignored(monkeypatch):
    """As nohup does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr("mezo.cli.tasks.main", lambda argv: os.kill(os.getpid(), signal.SIGHUP) or 0)
        assert main(["tasks"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_preset_is_below_what_is_given(tiny_options, as_flags, tmp_path):
    """A run with it has its options, and those of the command line and the file over them."""
    (tmp_path / "run.yaml").write_text("lr: 0.01\nlayers_to_transform: [2]")
    own = {"preset": "few-steps", "config": str(tmp_path / "run.yaml"), "r": 8, "batch_size": 8, "directions": 8}
    left_out = {*PRESETS["few-steps"], "layers_to_transform"}
    options = {name: value for name, value in tiny_options.items() if name not in left_out}
    assert main(["train", *as_flags({**options, **own, "steps": 2})]) == 0
    saved = json.loads(Path(options["output_dir"], "config.json").read_text())
    assert {name: saved[name] for name in ("lr", "r", "batch_size", "steps")} == {
        "lr": 0.01, "r": 8, "batch_size": 8, "steps": 2
    }  # fmt: skip
    for name in ("tuning", "lora_alpha", "lora_a", "lr_schedule"):
        assert saved[name] == PRESETS["few-steps"][name]


def test_presets_are_runs_that_can_be_and_help_names_them(capsys):
    for name, values in PRESETS.items():
        assert Config.of(model="m", output_dir="o", task="sst2", **values).to_dict().items() >= values.items()
        with pytest.raises(SystemExit):
            main(["train", "--help"])
        assert name in capsys.readouterr().out


def test_a_resumed_run_has_no_preset(tmp_path, capfd):
    assert main(["train", "--resume", str(tmp_path), "--preset", "few-steps"]) == 2
    assert "--preset few-steps is of a new run" in capfd.readouterr().err


def test_a_reader_that_has_enough_is_no_error():
    """As in `mezo models | head -1`."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "mezo", "models"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
