"""Tokenizers small enough to check by eye, and what the tests of the tasks read."""

import json

import datasets
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mezo.config import Config


@pytest.fixture(scope="module")
def bpe():
    """A byte-level decoder tokenizer: `<s>` first, words with their leading space one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = [" a fine film It was great", " a dull film It was terrible", "film:"] * 9
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def encoder():
    """A word-level encoder tokenizer with a mask: [CLS] ... [SEP]."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*specials, "a", "fine", "dull", "film", "it", "was", "great", "terrible", "very", "."]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", mask_token="[MASK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture(scope="module")
def roberta():
    """A byte-level encoder tokenizer as RoBERTa's: label words, with their leading space, are one token each."""
    words = "terrible bad okay good great objective subjective Yes Maybe No"
    words += " Description Entity Expression Human Location Number"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" " + words] * 9, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    mask = AddedToken("<mask>", lstrip=True, special=True)  # as RoBERTa's, it takes the space before it
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token=mask, **special)


@pytest.fixture
def make(tmp_path):
    """A Config whose files hold the given rows; keywords are its other fields."""

    def write(name, rows):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def build(train, dev=None, test=None, **fields):
        files = {"train": train, "dev": dev, "test": test}
        paths = {f"{name}_file": write(name, rows) for name, rows in files.items() if rows is not None}
        return Config.of(model="m", output_dir="o", **paths, **fields)

    return build


@pytest.fixture
def hub(monkeypatch):
    """SST-2 as the hub has it: fields, split names, the space at the end, a test split without labels."""
    rows = {
        "train": [{"idx": i, "sentence": f"film {i} ", "label": i % 2} for i in range(100)],
        "validation": [{"idx": i, "sentence": f"a dull film {i} ", "label": (i + 1) % 2} for i in range(10)],
        "test": [{"idx": i, "sentence": "no label ", "label": -1} for i in range(10)],
    }
    data = datasets.DatasetDict({split: datasets.Dataset.from_list(own) for split, own in rows.items()})
    monkeypatch.setattr("datasets.load_dataset", lambda path: {"stanfordnlp/sst2": data}[path])
    return rows
