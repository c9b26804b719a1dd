"""A GGUF file as a model: its blocks stay as they are, and a run beside them is one beside the floats they mean."""

import json

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from transformers import AutoModelForCausalLM

from mezo.api import replay, resume, train
from mezo.config import Config
from mezo.errors import UserError
from mezo.models.blocks import DECODERS, BlockLinear, decode
from mezo.models.gguf import convert_gguf
from mezo.models.load import Checkpoint, checkpoint_hash, load_base, load_tokenizer, weights_hash
from mezo.models.quantization import is_quantised
from mezo.run.export import export
from mezo.run.trajectory import read_header, read_trajectory
from mezo.runtimes.hf.runtime import HFRuntime
from tests.killed import killed_in_step
from tests.models.test_families import difference, log_odds
from tests.runtimes.hf.test_runtime import examples
from tests.tiny_gguf import save

Kind = GGMLQuantizationType
BY_NUMPY = (Kind.Q5_0, Kind.Q5_K)  # of those without a decoder here
SIMPLE = (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.Q5_0)  # which the library can write
EXACT = 1e-5  # of float32 log-probabilities: sums are ordered differently


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("kind", [*DECODERS, *BY_NUMPY], ids=lambda kind: kind.name)
def test_blocks_mean_what_the_library_says(kind):
    """To the bit, whatever the bytes; some make scales that are infinite or no number."""
    weights, nbytes = GGML_QUANT_SIZES[kind]
    rows = np.random.default_rng(0).integers(0, 256, (50, 3 * nbytes), dtype=np.uint8)
    got, want = decode(torch.from_numpy(rows), kind), torch.from_numpy(dequantize(rows, kind))
    assert got.shape == (50, 3 * weights)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())
    assert got.isfinite().float().mean() > 0.5


@pytest.mark.parametrize("kind", SIMPLE, ids=lambda kind: kind.name)
def test_a_model_holds_the_blocks_of_its_file(kind, tmp_path):
    path = save(tmp_path, kind)
    checkpoint = Checkpoint.of(path)
    base = load_base(checkpoint, torch.float32)
    packed = {name: module for name, module in base.named_modules() if isinstance(module, BlockLinear)}
    assert checkpoint.quantised == "GGUF"
    assert is_quantised(base)
    assert len(packed) == 3 * 7
    floats = AutoModelForCausalLM.from_pretrained(convert_gguf(path, tmp_path / "floats"))
    for name, module in packed.items():
        weight = floats.get_submodule(name).weight
        size, nbytes = GGML_QUANT_SIZES[kind]
        assert module.blocks.nbytes == weight.numel() // size * nbytes
        assert torch.equal(module.weight, weight)
    ids = torch.arange(3, 40)[None]
    assert torch.equal(base(ids).logits, floats(ids).logits)
    whole = weights_hash(base)
    assert whole == checkpoint_hash(path, "float32")
    packed["model.layers.1.mlp.up_proj"].blocks[3, 5] ^= 1
    assert weights_hash(base) != whole


def test_a_file_of_floats_is_a_plain_model(tmp_path):
    path = save(tmp_path, Kind.F16)
    base = load_base(Checkpoint.of(path), torch.float32)
    assert not is_quantised(base)
    floats = AutoModelForCausalLM.from_pretrained(convert_gguf(path, tmp_path / "floats"))
    ids = torch.arange(3, 40)[None]
    assert torch.equal(base(ids).logits, floats(ids).logits)


@pytest.mark.parametrize("layers", [(2,), ()], ids=["last layer", "all layers"])
def test_scores_are_those_of_the_floats(layers, tmp_path):
    """By a trunk cache and through all layers, at a theta that is not zero."""
    path, data = save(tmp_path, Kind.Q4_0), examples(6)
    scores = []
    for model in (path, str(convert_gguf(path, tmp_path / "floats"))):
        options = {"target_modules": ("q_proj", "o_proj", "up_proj"), "layers_to_transform": layers}
        options |= {"directions": 3, "batch_size": 6}
        built = HFRuntime(*Config.of(model=model, task="sst2", output_dir="unused", **options).for_runtime)
        built.prepare({"train": data})
        assert (built.scorer.trunk is not None) == bool(layers)
        built._use_copy(0, seed=3)
        scores.append(difference(built._scores("train", range(6), [0] * 6)))
    want = log_odds(built.parts.model, data)
    assert want.std() > 0.1
    for got in scores:
        assert torch.allclose(got, want, atol=EXACT, rtol=0)


def test_a_run_by_a_file_is_the_run_by_its_floats(tiny_options, tmp_path):
    """Its log, resume and replay; what it leaves merges into a plain model."""
    path = save(tmp_path, Kind.Q4_1)
    options = {**tiny_options, "model": path, "steps": 12, "eval_every": 6}
    result = train(Config.of(**options))
    run, floats = tmp_path / "run", str(convert_gguf(path, tmp_path / "floats"))
    other = train(Config.of(**{**options, "model": floats, "output_dir": str(tmp_path / "other")}))
    assert result["test"]["after"]["loss"] == pytest.approx(other["test"]["after"]["loss"], abs=EXACT)
    assert result["test"]["after"]["loss"] != result["test"]["before"]["loss"]
    for mine, its in zip(
        *(read_trajectory(at / "trajectory.jsonl")[1] for at in (run, tmp_path / "other")), strict=True
    ):
        assert mine.losses.plus == pytest.approx(its.losses.plus, abs=EXACT)
        assert mine.losses.minus == pytest.approx(its.losses.minus, abs=EXACT)
    assert read_header(run / "trajectory.jsonl")["model_hash"] == checkpoint_hash(path, "float32")

    log, weights = (run / "trajectory.jsonl").read_bytes(), (run / "adapter/adapter_model.safetensors").read_bytes()
    replay(str(run), str(tmp_path / "replayed"))
    assert (tmp_path / "replayed/adapter_model.safetensors").read_bytes() == weights
    killed_in_step(8, run, evaluations=2)
    assert resume(str(run))["test"] == result["test"]
    assert (run / "trajectory.jsonl").read_bytes() == log

    for name, folder in (("run", "merged"), ("other", "merged-floats")):
        export(str(tmp_path / name), str(tmp_path / folder), "merged")
    ids = torch.arange(3, 20)[None]
    merged, wanted = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("merged", "merged-floats"))
    assert not is_quantised(merged)
    assert torch.allclose(merged(ids).logits, wanted(ids).logits, atol=1e-4, rtol=0)
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())


def test_what_cannot_be_is_refused_in_one_line(tmp_path):
    path = save(tmp_path, Kind.Q8_0)
    with pytest.raises(UserError, match=r"--quantization int8: the model is quantised already \(GGUF\): leave it out"):
        load_base(Checkpoint.of(path, quantization="int8"), torch.float32)
    with pytest.raises(UserError, match=r"--tuning full: .* is quantised \(GGUF\)"):
        HFRuntime(*Config.of(model=path, tuning="full", task="sst2", output_dir="unused").for_runtime)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF")
    for read in (Checkpoint.of, load_tokenizer):
        with pytest.raises(UserError, match=r"--model .*damaged.gguf: .*no GGUF file that transformers reads"):
            read(str(damaged))


def test_the_engine_refuses_a_file_before_it_starts(tmp_path):
    pytest.importorskip("sglang")
    from mezo.runtimes.sglang.support import model_class

    with pytest.raises(UserError, match=r"--model .*model.gguf: a GGUF file has not been tried on SGLang: use --run"):
        model_class(Checkpoint.of(save(tmp_path, Kind.Q8_0)))
