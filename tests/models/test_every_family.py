"""Every family trains by default options; its scores are those of its own forward pass, its log gives its adapter."""

import os
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from mezo.api import loaded, replay, start
from mezo.config import Config
from mezo.data.example import Example
from mezo.method.step import Step
from mezo.models.families import leaf_of
from mezo.models.lora import drawn
from mezo.models.proved import markdown, proved, record
from mezo.run.adapter import read_adapter, same_bits, save_adapter
from mezo.runtimes.hf.reading import ByParts
from mezo.runtimes.hf.runtime import HFRuntime
from mezo.tasks import with_objective
from tests import tiny_families
from tests.tiny_families import FAMILIES

README = Path(__file__).parents[2] / "README.md"
BETWEEN = re.compile("(<!-- families -->).*(<!-- end of families -->)", re.DOTALL)
RECORD = os.environ.get("MEZO_RECORD_FAMILIES")  # make families
EXACT = 1e-5  # of log-probabilities in float32


@torch.no_grad()
def by_itself(model, example):
    """Log-probabilities of the options of an example by a model's own forward pass, without anything of ours."""
    more = {}
    if model.config.is_encoder_decoder:
        more["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id]])
    logits = model(input_ids=torch.tensor([example.prompt]), **more).logits[0]
    at = logits[-1 if example.mask is None else example.mask].double()
    return at[[option[0] for option in example.options]].log_softmax(-1)


def of_peft(name, adapter, weights=None):
    """A stock model with an adapter as PEFT loads it; attention is what defines the family, in float32 throughout."""
    base = tiny_families.build(name)
    if base._can_set_attn_implementation():
        base.set_attn_implementation("eager")
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    if weights is not None:
        state = {key.replace(".weight", ".default.weight"): value for key, value in weights.items()}
        loaded_keys = model.load_state_dict(state, strict=False)
        assert not loaded_keys.unexpected_keys
    return model


def assert_equal_scores(scores, model, data):
    for score, example in zip(scores, data, strict=True):
        assert (score.log_softmax(-1) - by_itself(model, example)).abs().max() < EXACT


@pytest.fixture(scope="module", params=list(FAMILIES))
def trained(request, tmp_path_factory, tiny_data):
    """A finished run by default options, and its runtime."""
    directory = tmp_path_factory.mktemp(request.param)
    prompt = "{text} It was" + ("<mask>" if FAMILIES[request.param].auto is tiny_families.MASKED else "")
    config = Config.of(
        model=tiny_families.save(request.param, directory / "model"),
        train_file=tiny_data["train_file"],
        num_train=8,
        prompt=prompt,
        label_words=(" terrible", " great"),
        output_dir=str(directory / "run"),
        steps=2,
        batch_size=4,
        lr=1e-2,
        report=False,
    )
    config = with_objective(config).absolute()
    with loaded(config, need="train") as (runtime, splits, _):
        start(config, runtime, splits)
        yield request.param, runtime, splits["train"], directory


def with_last_layer(path, data, base, **others):
    """A runtime that adapts the last layer, and there what leaves keys and values alone, as far as there is such."""
    if not base.layers:
        return None
    last = base.layers[-1]
    linear = {name.rsplit(".", 1)[-1] for name, m in last.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))}
    free = (linear & base.family.kv_free) - base.family.uncalled
    targets = tuple(sorted(free)) or ("all-linear",)
    layers = {"layers_to_transform": (len(base.layers) - 1,), "target_modules": targets}
    return prepared(path, data, **layers, **others)


def prepared(path, data, **others):
    """A runtime at a theta that changes scores."""
    config = Config.of(
        model=path, output_dir="unused", task="sst2", prompt="{text}", label_words=(" a", " b"), **others
    )
    runtime = HFRuntime(*config.for_runtime)
    runtime.prepare({"train": data})
    runtime.load(noisy(runtime))
    return runtime


def noisy(runtime):
    return {key: drawn(3, key, shape) for key, shape in runtime.spec.shapes.items()}


def kept(runtime):
    """What a trunk cache keeps of a row, in words."""
    if runtime is None or runtime.scorer.trunk is None:
        return "nothing"
    return "keys and values" if runtime.scorer.trunk.keep_kv else "hidden states"


def test_family(trained):
    name, runtime, data, directory = trained
    adapter, everything = directory / "run" / "adapter", range(len(data))
    replay(str(directory / "run"), str(directory / "again"))
    assert same_bits(read_adapter(adapter), read_adapter(directory / "again")) is None
    assert_equal_scores(runtime.score("train", everything), of_peft(name, adapter), data)
    runtime.load(noisy(runtime))
    runtime.perturb(Step([7], 1e-2))
    pair = runtime.score_pairs("train", everything)[0]
    for scores, copy in zip(pair, (runtime.plus, runtime.minus), strict=True):
        weights = dict(zip(copy.names, copy.tensors, strict=True))
        assert_equal_scores(scores, of_peft(name, adapter, weights), data)
    assert ((pair[0] - pair[1]).abs().amax(1) > 10 * EXACT).all()
    last = with_last_layer(runtime.source, data, runtime.parts)
    if last is not None:
        for score, example in zip(last.score("train", everything), data, strict=True):
            assert (score.log_softmax(-1) - by_itself(last.parts.model, example)).abs().max() < EXACT
    seen = {
        "trained": ", ".join(sorted(set(map(leaf_of, runtime.spec.shapes)))),
        "logits": "body and head" if isinstance(runtime.scorer.reading, ByParts) else "its own forward pass",
        "trunk": kept(last),
    }
    if RECORD:
        record(name, **seen)
    assert proved()[name].items() >= seen.items()


def classified(path, adapter):
    """The same for a model with a head for classes."""
    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    if base._can_set_attn_implementation():
        base.set_attn_implementation("eager")
    return PeftModel.from_pretrained(base, str(adapter)).eval()


def test_head_for_classes(trained, tmp_path):
    name, runtime, data, _ = trained
    data = [Example(e.prompt, ((0,), (1,)), e.label, pooled=True) for e in data]
    runtimes, seen = [], "-"
    if type(runtime.parts.base.config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not runtime.decoder:
        runtimes.append(prepared(runtime.source, data, head="classification"))
        runtimes.append(with_last_layer(runtime.source, data, runtimes[0].parts, head="classification"))
        seen = ", ".join(runtimes[0].spec.peft["modules_to_save"])
    for n, each in enumerate(filter(None, runtimes)):
        each.perturb(Step([7], 1e-2))
        pair = each.score_pairs("train", range(len(data)))[0]
        for m, (scores, copy) in enumerate(zip(pair, (each.plus, each.minus), strict=True)):
            adapter = tmp_path / f"{n}{m}"
            save_adapter(adapter, each.spec.peft, dict(zip(copy.names, copy.tensors, strict=True)))
            with torch.no_grad():
                own = classified(runtime.source, adapter)
                right = torch.stack([own(torch.tensor([e.prompt])).logits[0].double().log_softmax(-1) for e in data])
            assert (scores.log_softmax(-1) - right).abs().max() < EXACT
        assert (pair[0] - pair[1]).abs().max() > 10 * EXACT
    if RECORD:
        record(name, classes=seen)
    assert proved()[name]["classes"] == seen


def test_the_table_is_whole_and_readme_has_it():
    assert set(proved()) == set(FAMILIES)
    text = README.read_text()
    if RECORD:
        text = BETWEEN.sub(lambda between: f"{between[1]}\n{markdown()}\n{between[2]}", text)
        README.write_text(text)
    assert BETWEEN.search(text)[0].split("\n", 1)[1].rsplit("\n", 1)[0] == markdown()
