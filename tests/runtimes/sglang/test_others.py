"""Engines that are not ours, engines without our plugin, and what else SGLang can be asked to do."""

import os
import tempfile

import psutil
import pytest
import torch
from peft import PeftModel

from mezo.cli.main import main
from mezo.errors import UserError
from mezo.run.adapter import save_adapter
from mezo.run.export import export
from mezo.runtimes.sglang.engine import EngineHandle, _environment, accelerated
from mezo.runtimes.sglang.inside.handshake import ENVIRONMENT, started_by_trainer
from mezo.runtimes.sglang.scratch import Scratch
from tests import tiny_families
from tests.runtimes.sglang.conftest import engine, examples, noisy, reference
from tests.tiny_data import flags_of
from tests.tiny_models import build

CPU = {"device": "cpu", "dtype": "float32", "attention_backend": "torch_native", "sampling_backend": "pytorch",
       "grammar_backend": "none", "disable_overlap_schedule": True, "skip_server_warmup": True,
       "mem_fraction_static": 0.8, "max_total_tokens": 4096}  # fmt: skip

IDS = [5, 9, 12, 30, 7]


@pytest.fixture(scope="module")
def llama(model):
    return model("llama")


@pytest.mark.slow  # below: the token opens one engine only
@pytest.mark.parametrize("leaked", ["", "1:deadbeef:/nowhere"], ids=["clean", "leaked"])
def test_a_plain_engine_is_unhooked(llama, monkeypatch, own_engine, leaked):
    """The package is installed and so is its entry point; an engine that no trainer started has none of it."""
    import sglang

    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    monkeypatch.setenv(ENVIRONMENT, leaked)
    plain = sglang.Engine(model_path=llama, **CPU)
    try:
        with pytest.raises(AssertionError, match="'Scheduler' object has no attribute 'mezo_setup'"):
            plain.collective_rpc("mezo_setup")
        assert len(plain.generate(input_ids=[5, 6, 7], sampling_params={"max_new_tokens": 2})["output_ids"]) == 2
    finally:
        plain.shutdown()


def exported(run, directory, form, modules, llama):
    """A run's adapter as `mezo export` writes it; PEFT's log-probabilities of all tokens after IDS under it."""
    runtime = reference(llama, examples(2), target_modules=modules)
    save_adapter(run / "adapter", runtime.spec.peft, noisy(runtime))
    export(str(run), str(directory), form)
    peft = PeftModel.from_pretrained(build("llama"), str(directory)).eval()
    with torch.no_grad():
        return peft(input_ids=torch.tensor([IDS])).logits[0, -1].log_softmax(-1)


def test_exported_adapters_are_served_with_equal_logits(llama, tmp_path, own_engine):
    """What `mezo export` writes in both forms, loaded by SGLang's own --lora-paths and by PEFT."""
    forms = {"peft": ("q_proj", "v_proj"), "sglang": ("q_proj", "up_proj")}
    wanted = [exported(tmp_path / f"{form} run", tmp_path / form, form, forms[form], llama) for form in forms]
    paths = [{"lora_name": form, "lora_path": str(tmp_path / form)} for form in forms]
    scratch = Scratch(str(tmp_path))
    try:
        arguments = {"model_path": llama, "lora_paths": paths, "lora_backend": "torch_native", **CPU}
        served = EngineHandle(arguments, scratch)
        answers = served.generate(
            input_ids=[IDS] * 2, lora_path=list(forms), sampling_params={"max_new_tokens": 0}, return_logprob=True,
            token_ids_logprob=[list(range(64))] * 2, logprob_start_len=[-1] * 2,
        )  # fmt: skip
        served.close()
    finally:
        scratch.close()
    for answer, expected in zip(answers, wanted, strict=True):
        got = [value for value, _, _ in answer["meta_info"]["output_token_ids_logprobs"][0]]
        assert torch.allclose(torch.tensor(got), expected, atol=5e-5, rtol=0)


@pytest.mark.slow  # an engine that starts and is refused: nothing of ours is in it
def test_an_engine_without_the_plugin_is_refused(llama, own_engine, monkeypatch):
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


@pytest.mark.slow  # test_scratch.py: what is kept of a failed start, with processes that stand for an engine's
def test_the_engines_own_reason_is_given_when_it_does_not_start(llama, own_engine, capfd):
    with (
        pytest.raises(UserError, match=r"the SGLang engine did not start: .*nonsense"),
        engine(llama, examples(2), engine_arg=("attention_backend=nonsense",)),
    ):
        pass
    assert "nonsense" not in capfd.readouterr().err, "the engine's output goes to its log"


@pytest.mark.slow  # test_scratch.py: what is kept of a failed start, with processes that stand for an engine's
def test_a_shape_that_the_engine_refuses_leaves_nothing(own_engine, tmp_path, tiny_data, capsys, monkeypatch):
    """A width that is no multiple of 32, which SGLang pads on a CPU."""
    model, scratch = tiny_families.save("phi3", tmp_path / "model"), tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    options = {"model": model, "train_file": tiny_data["train_file"], "prompt": "{text} It was", "runtime": "sglang"}
    options |= {"label_words": (" terrible", " great"), "output_dir": str(tmp_path / "run"), "steps": 1}
    options |= {"target_modules": ("o_proj", "down_proj"), "layers_to_transform": (1,)}
    assert main(["train", *flags_of(options)]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mezo: error: ")]
    assert len(error) == 1
    assert "--runtime hf" in error[0] or "; see " in error[0]
    assert not (tmp_path / "run").exists()
    assert not [path for path in scratch.iterdir() if path.is_dir()]
    engine_processes = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    assert not [p for p in engine_processes if str(scratch) in p.environ().get("MEZO_SGLANG", "") + str(p.cmdline())]


def test_an_engine_sees_nothing_of_torchrun_and_its_threads_sleep_while_they_wait(monkeypatch):
    """torchrun's own addresses would have an engine's ranks wait for those of the trainers."""
    torchrun = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1",
                "TORCHELASTIC_RUN_ID": "a", "GROUP_RANK": "0", "ROLE_NAME": "default"}  # fmt: skip
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")  # as the command sets it for its own threads
    seen = _environment({"tp_size": 1})
    assert accelerated() or seen["GOMP_SPINCOUNT"] is None
    assert {seen[name] for name in torchrun} == {None}
    assert accelerated() or seen["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert accelerated() or _environment({"tp_size": 1})["OMP_WAIT_POLICY"] == "ACTIVE", "a user's own setting wins"
