"""What is said of data that is allowed and seldom meant, and tokens that a model does not have."""

import json
import logging
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from mezo.api import train
from mezo.config import Config
from mezo.data.example import Example
from mezo.data.tokenization import oddities
from mezo.errors import UserError
from tests.tiny_models import save


@pytest.fixture
def tokenizer(tmp_path):
    made = AutoTokenizer.from_pretrained(save("llama", tmp_path / "model"))
    made.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<|end|>"]})
    return made


def example(prompt, label=0, n=1):
    return Example(tuple(prompt), ((5,), (6,)), label, where=f"train.jsonl line {n}")


def test_what_is_as_meant_is_passed_in_silence(tokenizer):
    bos, end = tokenizer.convert_tokens_to_ids(["<s>", "<|end|>"])
    in_every_prompt = [example([bos, 7, 8, end], 0), example([bos, 9, end], 1)]
    assert list(oddities({"train": in_every_prompt, "dev": [example([bos, 7])]}, tokenizer)) == []
    assert list(oddities({"train": [example([7])], "test": []}, tokenizer)) == []


def test_one_label_doubled_starts_and_control_tokens_are_said(tokenizer):
    bos, end = tokenizer.convert_tokens_to_ids(["<s>", "<|end|>"])
    train = [example([bos, bos, 7], 1, 1), example([bos, bos, end, 7], 1, 2), example([bos, bos, 8], 1, 3)]
    assert list(oddities({"train": train}, tokenizer)) == [
        "every training example has the label 1: there is nothing to tell apart",
        "3 of 3 prompts of train, such as train.jsonl line 1, begin with <s> twice: the tokenizer adds it, leave it out"
        " of --prompt",
        "1 of 3 texts of train, such as train.jsonl line 2, contain <|end|>, a control token of the model",
    ]


def test_a_run_says_it_once_and_goes_on(tiny_config, tmp_path, caplog):
    """Through the command's own way, with a tokenizer that adds a start token."""
    model = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(save("llama", model, vocab_size=80))
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    start = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", start)])
    tokenizer.save_pretrained(model)
    config = tiny_config.replace(model=str(model), prompt="<s>{text} It was", steps=1, noise=False)
    with caplog.at_level(logging.INFO, "mezo"):
        train(config)
    assert sum("begin with <s> twice" in message for message in caplog.messages) == 3


def test_a_token_without_an_embedding_is_refused_by_name(tiny_options, tmp_path):
    model, file = tmp_path / "model", tmp_path / "train.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(save("llama", model))
    tokenizer.add_tokens([f"new{i}" for i in range(80 - len(tokenizer))])
    tokenizer.save_pretrained(model)
    rows = [{"text": "the film was fine", "label": 1}, {"text": "the film new79 bad", "label": 0}]
    last = tokenizer.convert_ids_to_tokens(79)
    rows[1]["text"] = f"the film {last} bad"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config.of(**{**tiny_options, "model": str(model), "train_file": str(file)})
    with pytest.raises(UserError, match=rf"train.jsonl line 2: token '{last}' has the number 79, the model has emb"):
        train(config)
    assert not Path(config.machine.output_dir).exists()
