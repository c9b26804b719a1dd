"""Quantised bases on a CPU, through the command: each is one line, and nothing is left. test_gpu.py has them run."""

import tempfile

import psutil
import pytest

from mezo.cli.main import main
from mezo.runtimes.sglang.engine import accelerated
from tests.models.test_foreign_layers import SIZES, save_packed
from tests.models.test_quantization import SCHEMES, compressed
from tests.tiny_data import flags_of
from tests.tiny_models import save, tokenizer

pytestmark = pytest.mark.skipif(accelerated(), reason="a GPU multiplies by them")
ASKED = ("quantization=fp8",)


def awq(folder):
    return save_packed("awq", folder)[0]


def eight_bits(folder):
    """Of compressed-tensors, whose inputs are rounded too."""
    path = compressed(save("llama", folder / "plain", **SIZES), folder / "packed", *SCHEMES["8 bits, inputs too"])
    tokenizer().save_pretrained(path)
    return path


def plain(folder):
    return save("llama", folder / "plain", **SIZES)


@pytest.fixture
def refused(tmp_path, tiny_data, capsys, monkeypatch):
    """The one line with which `mezo train` refuses a model with arguments of the engine."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    def run(path, *arguments):
        options = {"model": path, "train_file": tiny_data["train_file"], "prompt": "{text} It was", "steps": 1}
        options |= {"label_words": (" terrible", " great"), "runtime": "sglang", "output_dir": str(tmp_path / "run")}
        options |= {"engine_arg": arguments} if arguments else {}
        before = set(psutil.Process().children(recursive=True))
        assert main(["train", *flags_of(options)]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mezo: error: ")]
        assert len(lines) == 1
        assert not (tmp_path / "run").exists()
        assert not [path for path in scratch.iterdir() if path.is_dir()]
        after = set(psutil.Process().children(recursive=True)) - before
        assert not [process for process in after if process.status() != psutil.STATUS_ZOMBIE]
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (plain, ASKED, "--engine-arg quantization=fp8: SGLang multiplies by fp8 weights on a CPU with kernels for AMX"),
        (plain, ("quantization=bitsandbytes", "load_format=bitsandbytes"), "has no products by bitsandbytes weights"),
        (awq, (), "it is quantised: SGLang multiplies by awq weights on a CPU with kernels for AMX alone"),
    ],
    ids=["fp8", "bitsandbytes", "awq"],
)
def test_a_format_without_products_is_one_line(refused, own_engine, monkeypatch, make, arguments, message, tmp_path):
    monkeypatch.setattr("mezo.runtimes.sglang.runtime.EngineHandle", lambda *args: pytest.fail("an engine started"))
    line = refused(make(tmp_path), *arguments)
    assert message in line
    assert ": use --runtime hf" in line
