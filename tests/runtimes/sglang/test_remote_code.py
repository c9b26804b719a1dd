"""A model that brings code of its own, on the engine: refused unless SGLang has its class; that class is then run."""

import pytest

from mezo.config import SGLang
from mezo.errors import UserError
from mezo.models.load import Checkpoint
from mezo.runtimes.sglang.arguments import engine_options
from mezo.runtimes.sglang.support import model_class
from tests.models.test_remote_code import MODELING, save_own
from tests.runtimes.sglang.conftest import engine, examples, noisy, reference, worst

SAME = MODELING.replace("0.5", "1.0")  # what SGLang's class of a Llama computes too


def test_a_class_that_sglang_lacks_is_refused(tmp_path, monkeypatch):
    path = save_own(tmp_path, monkeypatch, "OwnForCausalLM", MODELING)
    with pytest.raises(UserError, match="own: SGLang has no OwnForCausalLM of its own: use --runtime hf"):
        model_class(Checkpoint.of(path, trusted=True))


def test_trust_is_no_argument_of_the_engine():
    """A run's config.json could bring it along: that counts for nothing."""
    with pytest.raises(UserError, match="--engine-arg trust_remote_code is decided by --trust-remote-code: use that"):
        engine_options(SGLang(engine_arg=("trust_remote_code=true",)))


@pytest.mark.slow  # above: what is refused; test_runs.py: runs of models without code
def test_an_engine_starts_with_it_and_scores_as_the_models_own_code(tmp_path, monkeypatch):
    path, data = save_own(tmp_path, monkeypatch, "LlamaForCausalLM", SAME), examples(4)
    given = {"trust_remote_code": True, "target_modules": ("q_proj", "up_proj")}
    own = reference(path, data, **given)
    theta = noisy(own)
    own.load(theta)
    with engine(path, data, **given) as served:
        assert type(own.parts.base).__module__.startswith("transformers_modules.")
        assert served.spec.code_hash == own.spec.code_hash != ""
        served.load(theta)
        assert worst(served.score("train", range(4)), own.score("train", range(4))) < 1e-4
        assert own.score("train", range(4)).diff(dim=1).std() > 0.1


@pytest.mark.slow  # its proof at the start, of other models: test_comparison.py
def test_code_that_computes_something_else_than_sglangs_class_is_found(tmp_path, monkeypatch):
    path = save_own(tmp_path, monkeypatch, "LlamaForCausalLM", MODELING)
    given = {"trust_remote_code": True, "target_modules": ("q_proj", "up_proj")}
    with pytest.raises(UserError, match="log-probabilities"), engine(path, examples(4), **given):
        pass
