"""Engines that are not ours, engines without our plugin, and what else SGLang can be asked to do."""

import os

import pytest
import torch
from peft import PeftModel

from mezo.errors import UserError
from mezo.method.step import Step
from mezo.run.adapter import save_adapter
from mezo.run.export import export
from mezo.runtimes.sglang.engine import EngineHandle
from mezo.runtimes.sglang.inside.handshake import ENVIRONMENT, started_by_trainer
from tests.runtimes.sglang.conftest import engine, examples, noisy, reference, worst
from tests.tiny_models import build

CPU = {"device": "cpu", "dtype": "float32", "attention_backend": "torch_native", "sampling_backend": "pytorch",
       "grammar_backend": "none", "disable_overlap_schedule": True, "skip_server_warmup": True,
       "mem_fraction_static": 0.8, "max_total_tokens": 4096}  # fmt: skip


@pytest.fixture(scope="module")
def llama(model):
    return model("llama")


@pytest.mark.parametrize("leaked", ["", "1:deadbeef:/nowhere"], ids=["clean", "leaked variable"])
def test_a_plain_engine_is_unhooked(llama, monkeypatch, leaked):
    """The package is installed and so is its entry point; an engine that no trainer started has none of it."""
    import sglang

    for name, value in {"SGLANG_USE_CPU_ENGINE": "1", "TRITON_INTERPRET": "0", "MEZO_TEST_HOOKS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(ENVIRONMENT, leaked)
    plain = sglang.Engine(model_path=llama, **CPU)
    try:
        with pytest.raises(AssertionError, match="'Scheduler' object has no attribute 'mezo_setup'"):
            plain.collective_rpc("mezo_setup")
        assert len(plain.generate(input_ids=[5, 6, 7], sampling_params={"max_new_tokens": 2})["output_ids"]) == 2
    finally:
        plain.shutdown()


def test_an_engine_without_the_plugin_is_refused(llama, monkeypatch):
    monkeypatch.setenv("SGLANG_PLUGINS", "somebody_elses")
    with (
        pytest.raises(UserError, match="MeZO's plugin is not in the SGLang engine: install"),
        engine(llama, examples(2)),
    ):
        pass


def test_the_token_opens_one_engine_only(tmp_path, monkeypatch):
    (tmp_path / "token").write_text("secret")
    monkeypatch.setenv(ENVIRONMENT, f"1:secret:{tmp_path}")
    assert started_by_trainer()
    monkeypatch.setenv(ENVIRONMENT, f"1:guess:{tmp_path}")
    assert not started_by_trainer()
    monkeypatch.setenv(ENVIRONMENT, f"{os.getpid()}:secret:{tmp_path}")
    assert not started_by_trainer(), "the trainer's own process needs no hooks"
    (tmp_path / "token").unlink()
    monkeypatch.setenv(ENVIRONMENT, f"1:secret:{tmp_path}")
    assert not started_by_trainer(), "once the engine runs the token is gone"


def test_the_engines_own_reason_is_given_when_it_does_not_start(llama, capfd):
    with (
        pytest.raises(UserError, match=r"the SGLang engine did not start: .*nonsense"),
        engine(llama, examples(2), engine_arg=("attention_backend=nonsense",)),
    ):
        pass
    assert "nonsense" not in capfd.readouterr().err, "the engine's output goes to its log"


def test_the_triton_lora_backend_scores_the_same(llama):
    """SGLang's Triton kernels for LoRA, interpreted, on weights that ours have written."""
    data, adapted = examples(2, low=5, high=6), {"target_modules": ("q_proj", "v_proj"), "layers_to_transform": (1,)}
    plain = reference(llama, data, **adapted)
    with engine(llama, data, interpret="1", engine_arg=("lora_backend=triton",), **adapted) as runtime:
        for one in (runtime, plain):
            one.load(noisy(one))
            one.perturb(Step([7], 1e-2))
        got, want = runtime.score_pairs("train", range(2))[0], plain.score_pairs("train", range(2))[0]
    assert max(worst(a, b) for a, b in zip(got, want, strict=True)) < 5e-5


@pytest.mark.parametrize(("form", "modules"), [("peft", ("q_proj", "v_proj")), ("sglang", ("q_proj", "up_proj"))])
def test_an_exported_adapter_is_served_with_equal_logits(llama, tmp_path, monkeypatch, form, modules):
    """What `mezo export` writes, loaded by SGLang's own --lora-paths and by PEFT."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    runtime = reference(llama, examples(2), target_modules=modules)
    save_adapter(tmp_path / "run" / "adapter", runtime.spec.peft, noisy(runtime))
    export(str(tmp_path / "run"), str(tmp_path / "exported"), form)
    ids, wanted = [5, 9, 12, 30, 7], list(range(64))
    peft = PeftModel.from_pretrained(build("llama"), str(tmp_path / "exported")).eval()
    with torch.no_grad():
        expected = peft(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    paths = [{"lora_name": "mine", "lora_path": str(tmp_path / "exported")}]
    served = EngineHandle({"model_path": llama, "lora_paths": paths, "lora_backend": "torch_native", **CPU}, tmp_path)
    try:
        answer = served.generate(
            input_ids=[ids], lora_path=["mine"], sampling_params={"max_new_tokens": 0}, return_logprob=True,
            token_ids_logprob=[wanted], logprob_start_len=[-1],
        )  # fmt: skip
    finally:
        served.close()
    got = torch.tensor([value for value, _, _ in answer[0]["meta_info"]["output_token_ids_logprobs"][0]])
    assert torch.allclose(got, expected, atol=5e-5, rtol=0)
