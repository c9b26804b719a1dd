"""What SGLang cannot do is said before an engine starts, by its own classes."""

import pytest
from transformers import AutoConfig

from mezo.errors import UserError
from mezo.models.load import Checkpoint
from mezo.runtimes.sglang.arguments import check_heads, refuse_small_limits
from mezo.runtimes.sglang.engine import accelerated
from mezo.runtimes.sglang.support import (
    model_class,
    refuse_inexact,
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


def test_a_run_asks_before_it_starts_an_engine(model, unstartable):
    with (
        pytest.raises(UserError, match="no LoRA on q_proj, v_proj for OPTForCausalLM"),
        engine(model("opt"), examples(2)),
    ):
        pass
    small = engine(model("llama"), examples(8), engine_arg=("max_total_tokens=64",))
    with pytest.raises(UserError, match="max_total_tokens=64: this run needs"), small:
        pass
