"""What SGLang cannot do is said before an engine starts, by its own classes."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from mezo.config import SGLang
from mezo.errors import UserError
from mezo.models.load import Checkpoint
from mezo.runtimes.sglang.arguments import check_heads, engine_arguments, engine_options, refuse_small_limits
from mezo.runtimes.sglang.engine import _environment, accelerated
from mezo.runtimes.sglang.support import (
    field_types,
    model_class,
    refuse_inexact,
    refuse_packed,
    refuse_small_shared_memory,
    refuse_window,
    refuse_without_lora,
    value_of,
)
from tests.runtimes.sglang.conftest import engine, examples

ARCHITECTURES = {"opt": "OPTForCausalLM", "gpt2": "GPT2LMHeadModel", "phi": "PhiForCausalLM",
                 "phi3": "Phi3ForCausalLM", "starcoder2": "Starcoder2ForCausalLM", "llama": "LlamaForCausalLM",
                 "mistral": "MistralForCausalLM", "gemma": "GemmaForCausalLM", "gpt_neox": "GPTNeoXForCausalLM",
                 "gemma2": "Gemma2ForCausalLM", "smollm3": "SmolLM3ForCausalLM",
                 "qwen2_moe": "Qwen2MoeForCausalLM"}  # fmt: skip


def checkpoint(kind, **others):
    config = AutoConfig.for_model(kind, architectures=[ARCHITECTURES[kind]], **others)
    return Checkpoint(f"some/{kind}", config)


@pytest.fixture
def unstartable(own_engine, monkeypatch):
    """No engine starts in this test."""
    monkeypatch.setattr("mezo.runtimes.sglang.runtime.EngineHandle", lambda *args: pytest.fail("an engine started"))


@pytest.mark.parametrize("kind", ["gpt_neox", "smollm3"])
def test_models_that_sglang_takes_from_transformers_are_refused(kind):
    with pytest.raises(UserError, match=f"some/{kind}: SGLang has no {ARCHITECTURES[kind]} of its own: use --runtime"):
        model_class(checkpoint(kind))


@pytest.mark.skipif(accelerated(), reason="a GPU computes them")
def test_experts_are_refused_without_a_gpu():
    with pytest.raises(UserError, match="experts of Qwen2MoeForCausalLM on a GPU only: use --runtime hf"):
        model_class(checkpoint("qwen2_moe"))


@pytest.mark.parametrize(
    ("kind", "leaf"),
    [("opt", "q_proj"), ("opt", "fc1"), ("gpt2", "c_attn"), ("phi", "fc1"), ("phi3", "qkv_proj"),
     ("phi3", "gate_up_proj"), ("starcoder2", "c_fc")],
)  # fmt: skip
def test_modules_without_lora_are_refused(kind, leaf):
    model = checkpoint(kind)
    with pytest.raises(UserError, match=f"has no LoRA on {leaf} for {ARCHITECTURES[kind]}: use --runtime hf"):
        refuse_without_lora(model, model_class(model), [f"base_model.model.model.layers.0.x.{leaf}.lora_A.weight"])


@pytest.mark.parametrize(
    ("kind", "leaf"),
    [("llama", "q_proj"), ("llama", "lm_head"), ("phi", "v_proj"), ("starcoder2", "k_proj"), ("gemma", "down_proj")],
)
def test_modules_with_lora_are_not_refused(kind, leaf):
    model = checkpoint(kind)
    refuse_without_lora(model, model_class(model), [f"base_model.model.model.layers.0.x.{leaf}.lora_A.weight"])


def test_a_class_that_is_another_function_is_refused():
    gemma = checkpoint("gemma")
    with pytest.raises(UserError, match=r"GemmaForCausalLM computes the exact GELU, .* use --runtime hf"):
        refuse_inexact(gemma, model_class(gemma))
    refuse_inexact(checkpoint("llama"), model_class(checkpoint("llama")))


@pytest.mark.skipif(accelerated(), reason="attention on a GPU caps")
def test_attention_that_does_not_cap_is_refused():
    gemma = checkpoint("gemma2")
    with pytest.raises(UserError, match="a CPU leaves out the soft-capping of Gemma2ForCausalLM: use --runtime hf"):
        refuse_inexact(gemma, model_class(gemma))
    gemma.config.attn_logit_softcapping = None
    refuse_inexact(gemma, model_class(gemma))


@pytest.mark.skipif(accelerated(), reason="a GPU multiplies them")
def test_quantised_weights_are_refused_on_a_cpu_without_kernels_for_them():
    llama, awq = checkpoint("llama"), checkpoint("llama", quantization_config={"quant_method": "awq"})
    torchao = checkpoint("llama", quantization_config={"quant_method": "torchao"})
    for none in ({}, {"quantization": None}, {"quantization": "unquant"}, {"load_format": "safetensors"}):
        refuse_packed(llama, none)
    lacking = r"with kernels for AMX alone, and (this CPU has no AMX|no build of its kernel package has them here)"
    cases = [
        (llama, {"quantization": "fp8"}, f"arg quantization=fp8: SGLang multiplies by fp8 weights on a CPU {lacking}"),
        (llama, {"quantization": "bitsandbytes"}, "quantization=bitsandbytes: SGLang has no products by bitsandbytes"),
        (llama, {"load_format": "gguf"}, "--engine-arg load_format=gguf: SGLang has no products by gguf weights for a"),
        (llama, {"quantization": "int8wo"}, "--engine-arg quantization=int8wo: SGLang has no format of that name"),
        (awq, {}, f"--model some/llama: it is quantised: SGLang multiplies by awq weights on a CPU {lacking}"),
        (torchao, {}, "--model some/llama: it is quantised: SGLang has no products by torchao weights for a CPU"),
    ]
    for model, options, message in cases:
        remedy = "with --quantization int8" if model is llama else ""
        with pytest.raises(UserError, match=rf"{message}.*: use --runtime hf ?{remedy}$"):
            refuse_packed(model, options)


def test_a_window_that_sglang_does_not_have_is_refused_where_a_row_is_longer():
    mistral = checkpoint("mistral", sliding_window=8)
    refuse_window(mistral, model_class(mistral), 8)
    with pytest.raises(UserError, match=r"last 8 tokens, which SGLang's MistralForCausalLM does not do.*row has 9"):
        refuse_window(mistral, model_class(mistral), 9)
    refuse_window(checkpoint("mistral", sliding_window=None), model_class(mistral), 9)


@pytest.mark.skipif(accelerated(), reason="the ranks of a GPU may hold copies of a head")
def test_heads_that_ranks_on_a_cpu_cannot_share_are_refused():
    llama = checkpoint("llama", num_attention_heads=8, num_key_value_heads=2)
    check_heads(2, llama)
    with pytest.raises(UserError, match="--tp 4: some/llama has 2 key-value heads, which 4 ranks cannot share"):
        check_heads(4, llama)


def test_a_small_shared_memory_is_refused_for_several_ranks():
    refuse_small_shared_memory(1, 65536)
    with pytest.raises(UserError, match=r"--tp 2: /dev/shm has 65,536 bytes free.*--shm-size"):
        refuse_small_shared_memory(2, 65536)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [("max_loras_per_batch", "5", 5), ("served_model_name", "@x", "@x"), ("served_model_name", "12", "12"),
     ("mem_fraction_static", "8e-1", 0.8), ("mem_fraction_static", "1", 1.0), ("disable_cuda_graph", "true", True),
     ("max_total_tokens", "null", None), ("json_model_override_args", '{"a": 1}', '{"a": 1}'),
     ("grammar_backend", "none", "none")],
)  # fmt: skip
def test_values_are_read_by_the_type_of_the_engines_field(key, text, value):
    found = value_of(key, text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [("max_loras_per_batch", "abc", "max_loras_per_batch must be int, got 'abc'"),
     ("max_loras_per_batch", "3.7", "max_loras_per_batch must be int, got '3.7'"),
     ("disable_cuda_graph", "maybe", "disable_cuda_graph must be bool, got 'maybe'"),
     ("max_total_tokens", "many", r"max_total_tokens must be Optional\[int\], got 'many'"),
     ("model_loader_extra_config", "", "model_loader_extra_config= has no value")],
)  # fmt: skip
def test_values_of_another_type_are_refused(key, text, message):
    with pytest.raises(UserError, match=f"--engine-arg {message}"):
        value_of(key, text)


@pytest.mark.parametrize("key", ["max_total_tokens", "max_prefill_tokens", "context_length"])
def test_limits_below_what_a_step_needs_are_refused(key):
    refuse_small_limits({key: 90}, 90, 90)
    with pytest.raises(UserError, match=f"--engine-arg {key}=89: this run needs 90: raise it, leave it out, or lower"):
        refuse_small_limits({key: 89}, 90, 90)


@pytest.mark.parametrize(
    ("given", "message"),
    [("disable_overlap_schedule=false", "with overlap two are under way: leave it out"),
     ("enable_tf32_matmul=true", "rounds float32 products to 10 bits"),
     ("disable_cuda_graph=false", "is decided by --engine-graphs")],
)  # fmt: skip
def test_what_would_let_a_pass_read_other_slots_is_refused_by_name(given, message):
    with pytest.raises(UserError, match=f"--engine-arg {given.split('=')[0]}.*{message}"):
        engine_options(SGLang(engine_arg=(given,)))
    engine_options(SGLang(engine_arg=("disable_overlap_schedule=true",)))


@pytest.mark.skipif(accelerated(), reason="a GPU has graphs")
def test_graphs_are_refused_where_there_are_none():
    with pytest.raises(UserError, match="--engine-graphs decode: a CPU has no CUDA graphs"):
        engine_options(SGLang(engine_graphs="decode"))


def on_gpu(monkeypatch, capability, dtype="bfloat16", **options):
    """Arguments and environment of an engine as they would be on a GPU of a capability."""
    for module in ("engine", "arguments"):
        monkeypatch.setattr(f"mezo.runtimes.sglang.{module}.accelerated", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    spec = SimpleNamespace(model="some/model", peft={"r": 8})
    arguments = engine_arguments(SGLang(**options), 0, {}, dtype, spec, [{}] * 4, 8192, 0, requests=640)
    return arguments, _environment(arguments)


def test_both_signs_of_a_step_are_one_forward_pass_of_a_gpu(monkeypatch):
    assert on_gpu(monkeypatch, 9)[0]["max_running_requests"] == 640


@pytest.mark.parametrize("capability", [9, 10, 12])
@pytest.mark.parametrize("radix", ["auto", "off"])
def test_a_deterministic_engine_keeps_its_radix_cache_on_blackwell(monkeypatch, capability, radix):
    """SGLang takes flashinfer there, with which its deterministic mode turns the radix cache off in silence."""
    arguments, _ = on_gpu(monkeypatch, capability, deterministic=True, radix=radix)
    assert arguments.get("attention_backend") == ("triton" if capability >= 10 and radix == "auto" else None)
    assert "attention_backend" not in on_gpu(monkeypatch, capability, radix=radix)[0]


def test_float32_is_float32_in_tritons_products_too(monkeypatch):
    monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
    assert on_gpu(monkeypatch, 9, "float32")[1]["TRITON_F32_DEFAULT"] == "ieee"
    assert "TRITON_F32_DEFAULT" not in on_gpu(monkeypatch, 9)[1]
    monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32")
    assert on_gpu(monkeypatch, 9, "float32")[1]["TRITON_F32_DEFAULT"] == "tf32", "a user's own setting wins"


@pytest.mark.parametrize(
    ("graphs", "off"),
    [("off", {"disable_cuda_graph"}), ("decode", {"disable_prefill_cuda_graph"}),
     ("prefill", {"disable_decode_cuda_graph"}), ("all", set())],
)  # fmt: skip
def test_graphs_of_each_phase_are_asked_for_by_name(monkeypatch, graphs, off):
    arguments, _ = on_gpu(monkeypatch, 9, engine_graphs=graphs)
    assert {name for name in arguments if "graph" in name and arguments[name]} == off
    assert off <= set(field_types())


def test_modules_with_weights_derived_from_adapters_are_refused():
    from mezo.runtimes.sglang.inside.worker import refuse_derived

    class Derived(torch.nn.Module):
        def on_lora_slots_updated(self, slot_ids):
            pass

    refuse_derived([{"q": torch.nn.Linear(1, 1)}])
    with pytest.raises(ValueError, match=r"Derived derives weights from an adapter .* use --runtime hf"):
        refuse_derived([{"q": torch.nn.Linear(1, 1)}, {"q": Derived()}])


def test_a_run_asks_before_it_starts_an_engine(model, unstartable):
    with (
        pytest.raises(UserError, match="no LoRA on q_proj, v_proj for OPTForCausalLM"),
        engine(model("opt"), examples(2)),
    ):
        pass
    small = engine(model("llama"), examples(8), engine_arg=("max_total_tokens=64",))
    with pytest.raises(UserError, match="max_total_tokens=64: this run needs"), small:
        pass
