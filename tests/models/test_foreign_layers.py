"""Quantised checkpoints whose layers are no class of torch's: an adapter beside them where PEFT has one, else a line.

GPTQ and AWQ need gptqmodel (7.7) and GPTQ optimum (2.3), without which these tests are skipped; the first has no build
in the registry, and pins another torch. Their checkpoints are packed here, by the layouts that those libraries read.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers import HfQuantizer, auto
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mezo.api import replay, resume, train
from mezo.cli.main import main
from mezo.config import Config
from mezo.errors import UserError
from mezo.models.load import Checkpoint, checkpoint_hash, load_base
from mezo.models.quantization import is_foreign
from mezo.run.export import export
from mezo.runtimes.hf.runtime import HFRuntime
from tests.killed import killed_in_step
from tests.models.test_families import difference, log_odds
from tests.runtimes.hf.test_runtime import examples
from tests.tiny_models import save

EXACT = 1e-5  # of float32 log-probabilities: sums are ordered differently
GROUP = 32
SIZES = {"hidden_size": 128, "intermediate_size": 128}  # what the kernels for a CPU divide by
PER_WORD = 8  # of 4 bits
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def says(path, method, **others):
    """Have the configuration of a checkpoint say how it is quantised; return its path."""
    config = json.loads((Path(path) / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **others}
    (Path(path) / "config.json").write_text(json.dumps(config))
    return path


class Rounded(nn.Module):
    """What a library of quantised weights may have in the place of a linear layer."""

    def __init__(self, like):
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self.weight = nn.Parameter(torch.empty_like(like.weight), requires_grad=False)

    def forward(self, x):
        return x @ self.weight.T.mul(8).round().div(8)


@pytest.fixture
def toy(tmp_path):
    """A checkpoint of a library that transformers is told of."""

    @register_quantization_config("toy")
    class ToyConfig(QuantizationConfigMixin):
        def __init__(self, **others):
            self.quant_method = "toy"

    @register_quantizer("toy")
    class Toy(HfQuantizer):
        requires_calibration = is_trainable = False
        is_serializable = param_needs_quantization = lambda self, *args, **kwargs: False

        def _process_model_before_weight_loading(self, model, **kwargs):
            for name, module in list(model.named_modules()):
                if isinstance(module, nn.Linear) and name != "lm_head":
                    model.set_submodule(name, Rounded(module))

    yield says(save("llama", tmp_path / "toy"), "toy")
    for known in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        del known["toy"]


@pytest.mark.parametrize("targets", [(), ("q_proj",), ("all-linear",)], ids=["default", "named", "all-linear"])
def test_layers_that_peft_does_not_know_are_named(toy, targets, tiny_options, as_flags, tmp_path, capsys):
    base = load_base(Checkpoint.of(toy), torch.float32)
    assert sum(map(is_foreign, base.modules())) == 3 * 7
    options = {**tiny_options, "model": toy, "target_modules": targets}
    refused = (
        r"toy: its weights are quantised \(toy\), in layers of Rounded, beside which PEFT has no LoRA: use the mod"
    )
    with pytest.raises(UserError, match=refused):
        train(Config.of(**options))
    assert main(["train", *as_flags(options)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("with --quantization int8, or as a GGUF file")
    assert not Path(tiny_options["output_dir"]).exists()


def in_words(codes, order=tuple(range(PER_WORD))):
    """Numbers of 4 bits, (rows, columns), eight of a row in an int32: the lowest bits hold column order[0]."""
    codes = codes.to(torch.int64).unflatten(1, (-1, PER_WORD))[..., list(order)]
    words = sum(codes[..., place] << 4 * place for place in range(PER_WORD))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def packed(method, weight):
    """Tensors of a layer (outputs, inputs) in 4 bits with a scale for each 32 inputs, and the floats that it means."""
    outputs, inputs = weight.shape
    groups = weight.unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / 7).half()  # (outputs, groups)
    codes = (groups / scales[..., None].float()).round().add(8).clamp(0, 15)
    floats = codes.sub(8).mul(scales[..., None].float()).flatten(1)
    codes, middle = codes.flatten(1).T, torch.full((inputs // GROUP, outputs), 8)
    tensors = {"scales": scales.T.contiguous()}
    if method == "gptq":  # which stores a zero less one
        index = torch.arange(inputs, dtype=torch.int32) // GROUP
        tensors |= {"qweight": in_words(codes.T).T.contiguous(), "qzeros": in_words(middle - 1), "g_idx": index}
    else:
        tensors |= {"qweight": in_words(codes, AWQ_ORDER), "qzeros": in_words(middle, AWQ_ORDER)}
    return tensors, floats


def save_packed(method, directory):
    """Write a tiny Llama in 4 bits as a method has it, and the floats that it means; their paths."""
    plain = save("llama", directory / "plain", **SIZES)
    path = save("llama", directory / "packed", **SIZES)
    tensors = load_file(Path(path) / "model.safetensors")
    held, meant = {}, {}
    for name, tensor in tensors.items():
        if not name.endswith("proj.weight"):
            held[name] = meant[name] = tensor
            continue
        parts, meant[name] = packed(method, tensor)
        held |= {name.replace("weight", part): value.contiguous() for part, value in parts.items()}
    save_file(held, Path(path) / "model.safetensors", {"format": "pt"})
    save_file(meant, Path(plain) / "model.safetensors", {"format": "pt"})
    others = {"desc_act": False, "sym": True} if method == "gptq" else {"zero_point": True, "version": "gemm"}
    return says(path, method, bits=4, group_size=GROUP, **others), plain


LIBRARIES = {"gptq": ("gptqmodel", "optimum"), "awq": ("gptqmodel",)}
ROUNDED = 0.02  # of log-probabilities, by products in batches of other sizes: they round inputs


def needs(method):
    """A method, as a case that is skipped where its libraries are not installed."""
    lacking = [name for name in LIBRARIES[method] if not find_spec(name)]
    return pytest.param(method, marks=pytest.mark.skipif(bool(lacking), reason=f"{lacking} are not installed"))


EVERY = [needs(method) for method in LIBRARIES]


@pytest.mark.parametrize("method", EVERY)
def test_scores_are_the_models_own(method, tmp_path):
    """Under both signs, and near those of the floats that the codes mean."""
    path, plain = save_packed(method, tmp_path)
    data = examples(6)
    options = {"target_modules": ("q_proj", "o_proj", "up_proj"), "directions": 3, "batch_size": 6}
    config = Config.of(model=path, task="sst2", output_dir="unused", **options)
    built = HFRuntime(*config.for_runtime)
    built.prepare({"train": data})
    layers = [module for module in built.parts.base.modules() if is_foreign(module) and hasattr(module, "qweight")]
    assert len(layers) >= 3 * 7
    own = log_odds(AutoModelForCausalLM.from_pretrained(plain), data)
    got = difference(built.score("train", range(6)))
    assert torch.allclose(got, own, atol=0.1, rtol=0)
    assert own.std() > 0.5
    for copy in (0, 1):
        built._use_copy(copy, seed=3)
        got, want = difference(built._scores("train", range(6), [copy] * 6)), log_odds(built.parts.model, data)
        assert torch.allclose(got, want, atol=ROUNDED, rtol=0)
        assert not torch.allclose(got, own, atol=10 * ROUNDED, rtol=0)


@pytest.mark.parametrize("method", EVERY)
def test_a_run_beside_it_resumes_and_replays_to_the_bit(method, tiny_options, tmp_path):
    path, _ = save_packed(method, tmp_path)
    config = Config.of(**{**tiny_options, "model": path, "steps": 12, "eval_every": 6})
    result = train(config)
    run = tmp_path / "run"
    log, weights = (run / "trajectory.jsonl").read_bytes(), (run / "adapter/adapter_model.safetensors").read_bytes()
    assert json.loads(log.splitlines()[0])["model_hash"] == checkpoint_hash(path, "float32")
    replay(str(run), str(tmp_path / "replayed"))
    assert (tmp_path / "replayed/adapter_model.safetensors").read_bytes() == weights
    killed_in_step(8, run, evaluations=2)
    assert resume(str(run))["test"] == result["test"]
    assert (run / "trajectory.jsonl").read_bytes() == log
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert PeftModel.from_pretrained(base, str(run / "adapter"))
    with pytest.raises(UserError, match=r"layers of Torch.* cannot be written as floats: use --format peft"):
        export(str(run), str(tmp_path / "merged"), "merged")
    assert not (tmp_path / "merged").exists()


CANNOT = {  # what config.json of a checkpoint says, or an option, and the line about it
    "gptq": ({"bits": 4, "group_size": GROUP}, {}),
    "awq": ({"bits": 4, "group_size": GROUP, "zero_point": True}, {}),
    "hqq": ({"quant_config": {"weight_quant_params": {"nbits": 4, "group_size": GROUP}}}, {}),
    "int4": (None, {"quantization": "int4"}),
}


@pytest.mark.parametrize("case", list(CANNOT))
def test_what_cannot_be_had_here_is_one_line_and_nothing_else(
    case, tiny_options, as_flags, tmp_path, monkeypatch, capsys
):
    """hqq is refused by transformers on a CPU whether its library is there or not."""
    if case in LIBRARIES and all(map(find_spec, LIBRARIES[case])):
        pytest.skip("its libraries are installed")
    if case == "int4" and (torch.cuda.is_available() or not find_spec("torchao")):
        pytest.skip("there is a GPU, or torchao is not installed")
    held, given = CANNOT[case]
    path = save("llama", tmp_path / "model")
    if held is not None:
        says(path, case, **held)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(["train", *as_flags({**tiny_options, "model": path, **given})]) == 2
    captured = capsys.readouterr()
    line = [line for line in captured.err.splitlines() if line.startswith("mezo: error:")][-1]
    if held is None:
        assert "--quantization int4: torchao has no kernel for a CPU; use int8 or float8 or nf4 or fp4" in line
    else:
        assert f"its weights are quantised ({case}), and transformers does not load them here (" in line
        assert line.endswith("use the model in floats with --quantization int8, or as a GGUF file")
    assert captured.err.splitlines()[-1] == line
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before
