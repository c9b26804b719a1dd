"""`mezo env`: what is there is named with its version, what is missing or too old with the command that mends it."""

from importlib.metadata import PackageNotFoundError, requires, version

import torch
from packaging.requirements import Requirement

from mezo.cli import env
from mezo.cli.main import main
from mezo_kernels import available_backends


def lines(capsys):
    assert main(["env"]) == 0
    return {line[2:18].strip(): line[19:] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}


def test_versions_devices_and_backends_are_those_at_hand(capsys):
    found = lines(capsys)
    assert found["mezo"] == version("mezo-kernels")
    assert found["torch"] == version("torch")
    assert torch.backends.cpu.get_cpu_capability() in found["cpu"]
    for name in ("reference", "numba", "triton"):
        assert found[f"{name}, cpu"].startswith("available") == (name in available_backends("cpu"))
    needed = {Requirement(text).name for text in requires("mezo-kernels") if "extra" not in text}
    assert needed | {"torchao", "bitsandbytes", "sglang", "trl"} <= set(found)
    assert "pytest" not in found  # a tool of developers


def test_what_is_missing_or_old_has_its_command(capsys, monkeypatch):
    def other(name):
        if name in ("peft", "sglang", "bitsandbytes"):
            raise PackageNotFoundError(name)
        return "1.0" if name == "transformers" else version(name)

    monkeypatch.setattr(env, "version", other)
    found = lines(capsys)
    assert found["peft"].startswith("missing: pip install 'peft>=")
    assert found["sglang"] == "missing, which few need: pip install 'mezo-kernels[sglang]'"
    assert found["bitsandbytes"] == "missing, which few need: pip install 'mezo-kernels[quantization]'"
    assert found["transformers"].startswith("1.0, needed is >=")
    assert "pip install 'transformers>=" in found["transformers"]
