"""Encoder-decoders: the encoder reads the prompt with its special tokens, the decoder is scored, and writes."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from mezo.config import Config
from mezo.data.example import Example
from mezo.errors import UserError
from mezo.models.calibration import Sketch
from mezo.runtimes.hf.runtime import HFRuntime
from mezo_kernels import lora_init
from tests import tiny_families
from tests.runtimes.hf.test_runtime import ROUNDING, examples
from tests.tiny_models import tokenizer

NEW = 4
T5, BART = "decoder.block.1.layer", "model.decoder.layers.1"
READ = {
    "t5": ("encoder.block.1.layer.0.SelfAttention.q", f"{T5}.0.SelfAttention.q", f"{T5}.1.EncDecAttention.v"),
    "bart": ("model.encoder.layers.1.self_attn.q_proj", f"{BART}.self_attn.q_proj", f"{BART}.encoder_attn.v_proj"),
}
"""Adapted layers of the encoder, the decoder, and from one to the other."""
SPECIAL = {"t5": ("$A </s>", (1,), (0,)), "bart": ("<s> $A </s>", (1,), (2, 3))}  # template, what follows, start


def ending(template):
    """The tiny tokenizer with special tokens around a text, as those of T5 and BART have them."""
    made = tokenizer()
    pair = [("</s>", 1), ("<s>", 3)]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=pair)
    return made


@pytest.fixture(scope="module", params=list(SPECIAL))
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    tiny_families.build(request.param).save_pretrained(path)
    ending(SPECIAL[request.param][0]).save_pretrained(path)
    return request.param, str(path)


def runtime(path, data, **options):
    config = Config.of(**{"model": path, "output_dir": "unused", "task": "sst2", **options})
    built = HFRuntime(*config.for_runtime)
    built.prepare({"train": data})
    built.load({name: lora_init(3, name, shape) for name, shape in built.spec.shapes.items()})
    return built


def test_options_of_several_tokens_are_the_decoders(model):
    name, path = model
    _, end, start = SPECIAL[name]
    data = examples(6, several=True)
    built = runtime(path, data, objective="lm_cross_entropy")
    got = built.score("train", range(6))
    for example, scores in zip(data, got, strict=True):
        for option, score in zip(example.options, scores, strict=True):
            with torch.no_grad():
                logits = built.parts.model(
                    input_ids=torch.tensor([example.prompt + end]),
                    decoder_input_ids=torch.tensor([start + option[:-1]]),
                ).logits[0, len(start) - 1 :]
            each = logits.double().log_softmax(-1)[range(len(option)), list(option)]
            assert (score - each.mean()).abs() < ROUNDING
    assert built.eval_tokens.scored == sum(
        len(e.prompt) + len(end) + len(start) + len(option) - 1 for e in data for option in e.options
    )


def test_texts_are_those_of_transformers(model):
    name, path = model
    _, end, start = SPECIAL[name]
    data = [Example(example.prompt, (), 0) for example in examples(6)]
    built = runtime(path, data, objective="f1", task="drop", max_new_tokens=NEW)
    texts = built.generate("train", range(6), NEW, ())
    assert len(set(texts)) > 1
    base = built.parts.base
    base.generation_config.forced_bos_token_id = base.generation_config.forced_eos_token_id = None
    for example, text in zip(data, texts, strict=True):
        ids = base.generate(
            input_ids=torch.tensor([example.prompt + end]),
            decoder_input_ids=torch.tensor([start]),
            max_new_tokens=NEW,
            do_sample=False,
            num_beams=1,
        )
        assert text == built.writing.tokenizer.decode(ids[0, len(start) :], skip_special_tokens=True).strip()


def test_lora_a_is_calibrated_on_what_each_side_reads(model):
    """Encoder layers on the prompts, those of the decoder on the options, attention across on the encoder's output."""
    name, path = model
    _, end, start = SPECIAL[name]
    data = examples(6, several=True)
    built = runtime(path, data, objective="lm_cross_entropy", tuning="lora-b", lora_a="calibrated", r=2)
    found, base, seen = built.initial_theta(0), tiny_families.build(name), {module: [] for module in READ[name]}
    for module, parts in seen.items():
        base.get_submodule(module).register_forward_pre_hook(lambda _, args, parts=parts: parts.append(args[0][0]))
    for prompt, option in ((e.prompt + end, option) for e in data for option in e.options):
        with torch.no_grad():
            base(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([start + option[:-1]]))
    for module, parts in seen.items():
        sketch = Sketch(2)
        sketch.add(torch.cat(parts))
        a = found[f"base_model.model.{module}.lora_A.weight"]
        cosines = torch.nn.functional.cosine_similarity(a, sketch.even()).abs()
        assert torch.allclose(cosines, torch.ones(2), atol=1e-4), module


def test_a_decoder_without_a_start_and_a_prefix_are_refused(model, tmp_path):
    name, path = model
    with pytest.raises(UserError, match="has no place for a prefix, it has no list of its layers; use --tuning lora"):
        runtime(path, examples(2), tuning="prefix")
    base = tiny_families.build(name)
    base.config.decoder_start_token_id = None
    base.save_pretrained(tmp_path)
    ending(SPECIAL[name][0]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"its config\.json has no decoder_start_token_id"):
        runtime(str(tmp_path), examples(2))
