"""Models that read images too, given text alone: what is for images stays as it is, and text is written as they do."""

import pytest
import torch

from mezo.config import Config
from mezo.data.example import Example
from mezo.errors import UserError
from mezo.models.families import module_of
from mezo.runtimes.hf.runtime import HFRuntime
from mezo_kernels import lora_init
from tests import tiny_families

DATA = [Example(tuple(range(3 + i, 9 + 2 * i)), ((5,), (9,)), i % 2) for i in range(4)]


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def path(request, tmp_path_factory):
    return tiny_families.save(request.param, tmp_path_factory.mktemp(request.param))


def runtime(path, **others):
    made = HFRuntime(*Config.of(model=path, task="sst2", output_dir="unused", **others).for_runtime)
    made.prepare({"train": DATA})
    made.load({name: lora_init(3, name, shape) for name, shape in made.spec.shapes.items()})
    return made


@pytest.mark.parametrize("targets", [(), ("q_proj",), ("all-linear",)])
def test_adapters_are_beside_the_part_for_text_alone(path, targets):
    trained = {module_of(name) for name in runtime(path, target_modules=targets).spec.shapes}
    assert trained
    assert all(".language_model." in name for name in trained)


def test_text_is_written_as_the_model_writes_it(path):
    made = runtime(path, objective="reward", reward="unused.py:reward", max_new_tokens=6)
    texts = [made.generate("train", [i], 6, ()) for i in range(len(DATA))]
    assert made.generate("train", range(len(DATA)), 6, ()) == [text for (text,) in texts]
    model = made.parts.base
    model.generation_config.eos_token_id = None
    for (text,), example in zip(texts, DATA, strict=True):
        ids = torch.tensor([example.prompt])
        own = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)[0]
        assert text == made.writing.text(own[len(example.prompt) :].tolist(), ())


def test_all_of_it_is_not_trained(path):
    with pytest.raises(UserError, match="layers for images, which text would move at random; use --tuning lora"):
        runtime(path, tuning="full")
