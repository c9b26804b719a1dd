"""Every parameter as theta: the model that is scored is the base plus eps z, name by name, tied weights once."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from mezo.config import Config
from mezo.data.example import Example
from mezo.errors import UserError
from mezo.method.step import Step, Update
from mezo.models.full import read_parameters
from mezo.models.parts import load_parts
from mezo.runtimes.hf.runtime import HFRuntime
from mezo.runtimes.theta import PerturbedTheta
from mezo_kernels import ParamLayout, standard_normal
from tests.runtimes.hf.test_runtime import ROUNDING, examples
from tests.tiny_models import ENCODERS, save

EPS = 1e-3
TIED = {"llama": "model.embed_tokens.weight", "opt": "model.decoder.embed_tokens.weight",
        "roberta": "roberta.embeddings.word_embeddings.weight"}  # fmt: skip


@pytest.fixture(scope="module", params=list(TIED))
def family(request, tmp_path_factory):
    others = {"tie_word_embeddings": True} if request.param == "llama" else {}
    return request.param, save(request.param, tmp_path_factory.mktemp(request.param), **others)


def runtime(model, data, **options):
    config = Config.of(**{"model": model, "output_dir": "unused", "task": "sst2", "tuning": "full", **options})
    built = HFRuntime(*config.for_runtime)
    built.prepare({"train": data})
    for copy in (built.plus, built.minus):  # what no step has written must reach no score
        for tensor in copy.tensors:
            tensor.fill_(torch.nan)
    return built


def plain(name, model, dtype=torch.float32):
    auto = AutoModelForMaskedLM if name in ENCODERS else AutoModelForCausalLM
    return auto.from_pretrained(model, dtype=dtype).eval()


def perturbed_by_hand(model, scale, seed):
    """The model with scale * z added to each of its parameters."""
    for name, p in model.named_parameters():
        z = standard_normal(seed, name, 0, p.numel()).view(p.shape)
        p.data = (p.data.float() + torch.tensor(scale, dtype=torch.float32) * z).to(p.dtype)
    return model


@torch.no_grad()
def scores(model, example: Example):
    """Log-probabilities of the options, up to a constant, by one forward pass of the plain model."""
    logits = model(input_ids=torch.tensor([example.prompt])).logits[0]
    at = logits[len(example.prompt) - 1 if example.mask is None else example.mask]
    return at[[option for (option,) in example.options]].double()


def near(got, want):
    return torch.allclose(got - got[..., :1], want - want[..., :1], atol=ROUNDING, rtol=0)


def test_scores_are_those_of_models_perturbed_by_hand(family):
    name, model = family
    data = examples(6, name in ENCODERS)
    built = runtime(model, data)
    built.perturb(Step([7], EPS))
    plus, minus = built.score_pairs("train", range(6))[0]
    for got, scale in ((built.score("train", range(6)), 0.0), (plus, EPS), (minus, -EPS)):
        by_hand = perturbed_by_hand(plain(name, model), scale, seed=7)
        assert near(got, torch.stack([scores(by_hand, example) for example in data]))
    assert not near(plus, minus)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_parameter_is_perturbed_once_and_rounded_once(family, dtype):
    name, model = family
    built = runtime(model, examples(3, name in ENCODERS), dtype=dtype)
    by_hand = plain(name, model, getattr(torch, dtype))
    assert list(built.spec.shapes) == [own for own, _ in by_hand.named_parameters()]
    built.perturb(Step([7], EPS), watch=True)
    assert built.verify() is None
    for copy, scale in ((built.plus, EPS), (built.minus, -EPS)):
        want = dict(perturbed_by_hand(plain(name, model, getattr(torch, dtype)), scale, 7).named_parameters())
        assert all(torch.equal(tensor, want[own]) for own, tensor in zip(copy.names, copy.tensors, strict=True))
        built._use(copy)
        base = built.parts.model
        assert base.get_output_embeddings().weight.data_ptr() == base.get_input_embeddings().weight.data_ptr()
    assert {t.dtype for t in built.master.tensors} == {torch.float32}
    assert TIED[name] in built.spec.shapes


def test_an_update_is_theta_minus_the_sum(family):
    name, model = family
    built = runtime(model, examples(3, name in ENCODERS))
    built.update([Update([5], [1e-3]), Update([6], [-2e-3])], Step([7], EPS))
    want = perturbed_by_hand(perturbed_by_hand(plain(name, model), -1e-3, 5), 2e-3, 6)
    got = built.theta()
    assert all(torch.equal(got[own], p) for own, p in want.named_parameters())


def test_gradient_is_autograds(family):
    name, model = family
    data = examples(4, name in ENCODERS)
    built = runtime(model, data)
    got = built.gradient("train", range(4), lambda s: (s[:, 0] - s[:, 1]).mean())
    by_hand = plain(name, model)
    logits = [by_hand(input_ids=torch.tensor([e.prompt])).logits[0] for e in data]
    places = [len(e.prompt) - 1 if e.mask is None else e.mask for e in data]
    sum(own[at, 5] - own[at, 9] for own, at in zip(logits, places, strict=True)).div(4).backward()
    for own, p in by_hand.named_parameters():
        want = torch.zeros_like(p) if p.grad is None else p.grad
        assert torch.allclose(got[own], want, atol=1e-5 + 1e-4 * float(want.abs().max()), rtol=0), own


def test_a_base_trained_on_is_read_as_it_was(family):
    """theta_0 comes from the checkpoint again, whatever the runtime did since; another checkpoint is refused."""
    name, model = family
    built = runtime(model, examples(3, name in ENCODERS))
    before = built.theta()
    built.update([Update([5], [0.1])], Step([7], EPS))
    built.load(read_parameters(model, "float32", built.spec.model_hash))
    assert all(torch.equal(before[own], tensor) for own, tensor in built.theta().items())
    with pytest.raises(UserError, match="other weights than the run started from"):
        read_parameters(model, "bfloat16", built.spec.model_hash)


def test_a_model_of_two_dtypes_is_refused(tmp_path_factory):
    """A parameter that transformers keeps in float32 cannot be pointed at a copy in 16 bits."""
    model = save("llama", tmp_path_factory.mktemp("mixed"))
    config = Config.of(model=model, output_dir="unused", task="sst2", tuning="full", dtype="bfloat16")
    kept = AutoModelForCausalLM.from_pretrained(model).__class__
    before, kept._keep_in_fp32_modules_strict = kept._keep_in_fp32_modules_strict, {"norm"}
    try:
        with pytest.raises(UserError, match=r"holds .*norm.weight in torch.float32, the rest in torch.bfloat16"):
            load_parts(config.model, torch.device("cpu"), torch.bfloat16)
    finally:
        kept._keep_in_fp32_modules_strict = before


def test_slices_of_a_large_theta_are_compared_in_turn():
    """Every element is compared within a few watched steps, and a wrong one is named by its place in the whole."""
    shapes = {"matrix": (20, 5), "vector": (40,), "cube": (2, 3, 4), "scalar": ()}
    params = {name: torch.ones(shape) for name, shape in shapes.items()}
    watched, places = PerturbedTheta(ParamLayout(params), [], watched=60), set()
    for turn in range(10):
        watched.update([Update([turn], [0.5], 0.9)], watch=True)
        assert watched.verify() is None
        places |= set(range(20)[watched._watched[0][0]])
        assert sum(tensor.numel() for tensor in watched._watched[1][0].tensors) < 100
    assert places == set(range(20))
    watched.update([Update([1], [0.5])], watch=True)
    at = watched._watched[0][0].start
    assert at > 0
    watched.master.tensors[0][at, 3] += 1
    assert watched.verify().startswith(f"theta of matrix at index {5 * at + 3}:")
