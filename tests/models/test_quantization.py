"""Runs on a base in 8 or 4 bits: exact scores, a hash of what is packed, resume to the bit, merging, what is refused.

Formats whose library is not installed are skipped; those that have no kernel for a CPU are tests for a GPU.
"""

import json
import re
from importlib.util import find_spec
from typing import get_args, get_type_hints

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, TorchAoConfig

from mezo.api import evaluate_target, replay, resume, train
from mezo.config import Config, Model
from mezo.errors import UserError
from mezo.models import quantization
from mezo.models.load import Checkpoint, checkpoint_hash, load_base, weights_hash
from mezo.models.quantization import FORMATS, dequantise, is_packed, is_quantised, plain_weight
from mezo.run.export import export
from mezo.run.trajectory import read_header
from mezo.runtimes.hf.runtime import HFRuntime
from tests import tiny_families
from tests.killed import killed_in_step
from tests.models.test_families import difference, log_odds
from tests.runtimes.hf.test_runtime import examples
from tests.tiny_models import save

CPU = torch.device("cpu")
EXACT = 1e-5  # of float32 log-probabilities: sums are ordered differently
ROUNDED = 0.2  # of llm-int8, which rounds what weights are multiplied by to 8 bits: a rounding falls otherwise
MERGED = 1e-5  # of logits up to 2 by the same values in two layouts


def needs(name):
    """A format, as a case that is skipped where this machine cannot run it."""
    chosen = FORMATS[name]
    missing = pytest.mark.skipif(not find_spec(chosen.library), reason=f"{chosen.library} is not installed")
    return pytest.param(name, marks=[missing, pytest.mark.gpu] if chosen.gpu else [missing])


EVERY = [needs(name) for name in FORMATS]
torchao = pytest.mark.skipif(not find_spec("torchao"), reason="torchao is not installed")


def device_of(name):
    return torch.device("cuda" if name in FORMATS and FORMATS[name].gpu else "cpu")


def runtime(path, name, data, **options):
    given = {"model": path, "quantization": name, "task": "sst2", "output_dir": "unused", **options}
    config = Config.of(**given, device=str(device_of(name)), target_modules=("q_proj", "o_proj", "up_proj"))
    made = HFRuntime(*config.for_runtime)
    made.prepare({"train": data})
    return made


def test_the_option_names_the_formats():
    assert get_args(get_type_hints(Model)["quantization"]) == ("none", *FORMATS)


@pytest.mark.parametrize("layers", [(2,), ()], ids=["last layer", "all layers"])
@pytest.mark.parametrize("name", EVERY)
def test_scores_are_the_models_own(name, layers, tmp_path):
    """By a trunk cache and through all layers, under both signs, with batches of several rows."""
    data = examples(6)
    built = runtime(save("llama", tmp_path), name, data, layers_to_transform=layers, directions=3, batch_size=6)
    assert (built.scorer.trunk is not None) == bool(layers)
    assert built.scorer.rowwise is not None
    assert built.linear == "torch"
    built._use_copy(0, seed=3)
    packed = [module for module in built.parts.model.modules() if is_packed(module)]
    assert len(packed) == 3 * 7
    copies = [0] * len(data)
    got = difference(built._scores("train", range(6), copies))
    want = log_odds(built.parts.model, data)
    assert torch.allclose(got, want, atol=ROUNDED if name == "llm-int8" else EXACT, rtol=0)
    assert want.std() > 0.1


@pytest.mark.parametrize("name", EVERY)
def test_the_hash_covers_what_is_packed(name, tmp_path):
    """Every tensor of a packed weight: bytes, scales, and what a library keeps beside them."""
    path = save("llama", tmp_path)
    base = load_base(Checkpoint.of(path, quantization=name), torch.float32, device=device_of(name))
    whole = weights_hash(base)
    assert whole == checkpoint_hash(path, "float32", quantization=name)
    assert whole != checkpoint_hash(path, "float32")
    parts = [(n, t) for n, t in quantization.tensors_of(base) if "layers.1.mlp.up_proj" in n and t.numel() > 1]
    parts = [(n, t) for n, t in parts if "quant_state" not in n]  # text, written anew each time
    assert len(parts) >= 2
    for _, tensor in parts:
        data = tensor.view(-1).view(torch.uint8)
        data[0] ^= 1
        assert weights_hash(base) != whole
        data[0] ^= 1
    assert weights_hash(base) == whole


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("name", EVERY)
def test_dequantised_it_computes_the_same(name, family, tmp_path):
    """What is merged is what was trained beside. `opt` has biases."""
    base = load_base(Checkpoint.of(save(family, tmp_path), quantization=name), torch.float32, device=device_of(name))
    ids = torch.arange(3, 20, device=base.device)[None]
    before = base(ids).logits
    plain = dequantise(base)
    assert not is_quantised(plain)
    assert not any(map(is_packed, plain.modules()))
    assert torch.allclose(before, plain(ids).logits, atol=ROUNDED if name == "llm-int8" else MERGED, rtol=0)


@pytest.fixture(params=EVERY)
def finished(request, tiny_options):
    """A run of 12 steps on a quantised base, its format and result."""
    options = {**tiny_options, "steps": 12, "eval_every": 6, "device": str(device_of(request.param))}
    config = Config.of(**options, quantization=request.param)
    return config, train(config)


def test_a_run_leaves_an_adapter_resumes_and_replays_to_the_bit(finished, tmp_path):
    config, result = finished
    run, name = tmp_path / "run", config.model.quantization
    first = read_header(run / "trajectory.jsonl")
    assert first["quantization"] == name
    assert first["model_hash"] == checkpoint_hash(config.model.base, "float32", quantization=name)
    log, weights = (run / "trajectory.jsonl").read_bytes(), (run / "adapter/adapter_model.safetensors").read_bytes()

    replay(str(run), str(tmp_path / "replayed"))
    assert (tmp_path / "replayed/adapter_model.safetensors").read_bytes() == weights
    known = json.loads((tmp_path / "replayed/mezo_base.json").read_text())
    assert known["quantization"] == name

    killed_in_step(8, run, evaluations=2)
    assert resume(str(run))["test"] == result["test"]
    assert (run / "trajectory.jsonl").read_bytes() == log
    assert (run / "adapter/adapter_model.safetensors").read_bytes() == weights

    assert evaluate_target({}, run)["test"]["loss"] == pytest.approx(result["test"]["after"]["loss"], abs=1e-6)
    data = ("train_file", "dev_file", "test_file", "prompt", "label_words", "device")
    alone = evaluate_target({name: value for name, value in config.to_dict().items() if name in data}, run / "adapter")
    allowed = ROUNDED if name == "llm-int8" else 1e-6  # it is scored in batches of another size
    assert alone["test"]["loss"] == pytest.approx(result["test"]["after"]["loss"], abs=allowed)

    export(str(run), str(tmp_path / "merged"), "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not is_quantised(merged)
    base = load_base(Checkpoint.of(config.model.base, quantization=name), torch.float32, device=device_of(name))
    adapted = PeftModel.from_pretrained(base, str(run / "adapter"))
    ids = torch.arange(3, 20)[None]
    want = adapted(ids.to(base.device)).logits.cpu()
    assert torch.allclose(merged(ids).logits, want, atol=ROUNDED if name == "llm-int8" else 5 * MERGED, rtol=0)

    path = run / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization": "none"}))
    with pytest.raises(UserError, match=r"quantization of the header is not what config\.json says"):
        resume(str(run))


@pytest.mark.parametrize("name", EVERY)
def test_the_factors_of_lora_xs_are_of_the_weights_that_are_multiplied_by(name, tmp_path):
    built = runtime(save("llama", tmp_path), name, examples(4), tuning="lora-xs", r=4, layers_to_transform=(2,))
    layer = built.parts.base.get_submodule("model.layers.2.mlp.up_proj")
    weight = plain_weight(layer.base_layer).float()
    u, s, v = torch.linalg.svd(weight)
    product = layer.lora_B["default"][1].weight @ layer.lora_A["default"].weight
    assert torch.allclose(product, (u[:, :4] * s[:4]) @ v[:4], atol=1e-3, rtol=0)


@torchao
def test_a_checkpoint_that_is_quantised_is_taken_as_it_is(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig

    plain, packed = save("llama", tmp_path / "plain"), tmp_path / "packed"
    config = TorchAoConfig(Int8WeightOnlyConfig())
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=config).save_pretrained(packed)
    checkpoint = Checkpoint.of(str(packed))
    assert checkpoint.quantised == "torchao"
    base = load_base(checkpoint, torch.float32)
    assert weights_hash(base) == checkpoint_hash(plain, "float32", quantization="int8")
    with pytest.raises(UserError, match=r"--quantization int8: the model is quantised already \(torchao\): leave it"):
        load_base(Checkpoint.of(str(packed), quantization="int8"), torch.float32)
    data = examples(4)
    built = runtime(str(packed), "none", data)
    got = difference(built.score("train", range(4)))
    assert torch.allclose(got, log_odds(built.parts.model, data), atol=EXACT, rtol=0)
    with pytest.raises(UserError, match=r"--tuning full: .* is quantised \(torchao\)"):
        HFRuntime(*Config.of(model=str(packed), tuning="full", task="sst2", output_dir="unused").for_runtime)


SCHEMES = {  # of compressed-tensors: bits, kind of number, weights that share a scale, whether inputs are rounded too
    "packed in 4 bits": (4, "int", 16, False),
    "packed in 8 bits": (8, "int", None, False),
    "8 bits, inputs too": (8, "int", None, True),
    "fp8": (8, "float", None, False),
}


def compressed(plain, directory, bits, kind, group, inputs):
    """Write a model as compressed-tensors does."""
    from compressed_tensors import compressors
    from compressed_tensors import quantization as tensors

    size = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    weights = tensors.QuantizationArgs(num_bits=bits, type=kind, **size)
    rounded = tensors.QuantizationArgs(num_bits=8, strategy="token", dynamic=True) if inputs else None
    scheme = tensors.QuantizationScheme(targets=["Linear"], weights=weights, input_activations=rounded)
    model = AutoModelForCausalLM.from_pretrained(plain)
    config = tensors.QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"])
    tensors.apply_quantization_config(model, config)
    largest = 448.0 if kind == "float" else 2 ** (bits - 1) - 1
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            rows = module.weight.detach().unflatten(1, (-1, group or module.weight.shape[1]))
            module.weight_scale.data.copy_(rows.abs().amax(-1) / largest)
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(directory)
    return str(directory)


@pytest.mark.skipif(not find_spec("compressed_tensors"), reason="compressed-tensors is not installed")
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_compressed_tensors_are_restored_to_floats(scheme, tmp_path):
    bits, kind, group, inputs = SCHEMES[scheme]
    plain = save("llama", tmp_path / "plain")
    path, data = compressed(plain, tmp_path / "packed", bits, kind, group, inputs), examples(4)
    built = runtime(path, "none", data)
    assert built.spec.base["model_hash"] == checkpoint_hash(path, "float32") != checkpoint_hash(plain, "float32")
    got = difference(built.score("train", range(4)))
    assert torch.allclose(got, log_odds(built.parts.model, data), atol=ROUNDED if inputs else EXACT, rtol=0)
    own = log_odds(AutoModelForCausalLM.from_pretrained(path), data)  # unpacked in its first pass
    assert torch.allclose(got, own, atol=ROUNDED if inputs else EXACT, rtol=0)
    assert (own - log_odds(AutoModelForCausalLM.from_pretrained(plain), data)).abs().max() > 10 * EXACT
    base = load_base(Checkpoint.of(path), torch.float32)
    assert not is_quantised(base)
    base.save_pretrained(tmp_path / "floats")
    assert not json.loads((tmp_path / "floats/config.json").read_text()).get("quantization_config")
    floats = AutoModelForCausalLM.from_pretrained(tmp_path / "floats")
    assert torch.allclose(log_odds(floats, data), own, atol=ROUNDED if inputs else 5 * MERGED, rtol=0)


@torchao
def test_sixteen_bits_beside_eight(tmp_path):
    data = examples(6)
    built = runtime(save("llama", tmp_path), "int8", data, dtype="bfloat16", layers_to_transform=(2,))
    assert built.scorer.trunk is not None
    assert built.describe().startswith("1,792 LoRA parameters, torch.bfloat16 int8 base on cpu, trunk cache")


@torchao
def test_a_model_that_the_library_leaves_alone_is_refused(tmp_path):
    """gpt2 has no linear layers of torch's."""
    with pytest.raises(UserError, match="--quantization int8: torchao quantises linear layers, and this model"):
        load_base(Checkpoint.of(tiny_families.save("gpt2", tmp_path), quantization="int8"), torch.float32)


@pytest.mark.parametrize("name", [needs("nf4"), needs("llm-int8")])
def test_layers_that_keep_their_weights_transposed_are_merged_so(name, tmp_path):
    """gpt2's: what is written is a gpt2 again."""
    base = load_base(Checkpoint.of(tiny_families.save("gpt2", tmp_path), quantization=name), torch.float32)
    ids = torch.arange(3, 20)[None]
    before = base(ids).logits
    dequantise(base).save_pretrained(tmp_path / "plain")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(ids).logits
    assert torch.allclose(before, after, atol=ROUNDED if name == "llm-int8" else 5 * MERGED, rtol=0)


def test_without_the_library_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    wanted = "--quantization nf4 needs bitsandbytes, which is not installed: pip install 'mezo-kernels[quantization]'"
    with pytest.raises(UserError, match=re.escape(wanted)):
        load_base(Checkpoint.of(save("llama", tmp_path), quantization="nf4"), torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tuning": "full"}, "--quantization int8: --tuning full trains the weights themselves"),
        ({"runtime": "sglang"}, "--quantization int8: the engine quantises by itself: use --engine-arg quantization="),
        ({"quantization": "int3"}, "quantization must be one of none, int8, int4, float8, nf4, fp4, llm-int8"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Config.of(**{"model": "m", "task": "sst2", "output_dir": "unused", "quantization": "int8", **options})


@torchao
def test_four_bits_of_torchao_are_for_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(
        UserError, match="--quantization int4: torchao has no kernel for a CPU; use int8 or float8 or nf4 or fp4"
    ):
        load_base(Checkpoint.of(save("llama", tmp_path), quantization="int4"), torch.float32)


@torchao
def test_packed_products_of_floats_are_refused(tmp_path):
    with pytest.raises(UserError, match="--linear packed: the weights are quantised, torchao multiplies by them"):
        runtime(save("llama", tmp_path), "int8", examples(2), linear="packed")
