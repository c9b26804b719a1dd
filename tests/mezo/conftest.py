"""A tiny model and a tiny sentiment data set on disk."""

import json
import random

import pytest

from mezo.config import Config
from tests.tiny_models import save

GOOD, BAD = ("good", "fine", "great", "nice"), ("bad", "awful", "poor", "terrible")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("tiny-llama"))


def write_jsonl(path, n, seed):
    """n rows of text and label; the label is whether the words are good ones."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        words = ["the", rng.choice(("film", "story", "plot", "acting")), "was", rng.choice((BAD, GOOD)[i % 2])]
        rows.append({"text": " ".join(words[rng.randint(0, 3) :]), "label": i % 2})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    sizes = {"train": 48, "dev": 20, "test": 20}
    return {f"{s}_file": write_jsonl(directory / f"{s}.jsonl", n, i) for i, (s, n) in enumerate(sizes.items())}


@pytest.fixture
def tiny_options(tiny_model, tiny_data, tmp_path):
    """Options of a 40-step run: last-layer LoRA, evaluated every 10 steps."""
    return {
        "model": tiny_model,
        **tiny_data,
        "output_dir": str(tmp_path / "run"),
        "prompt": "{text} It was",
        "label_words": (" terrible", " great"),
        "target_modules": ("q_proj", "o_proj", "up_proj"),
        "layers_to_transform": (2,),
        "steps": 40,
        "batch_size": 8,
        "lr": 1e-2,
        "eps": 1e-2,
        "eval_every": 10,
    }


@pytest.fixture
def tiny_config(tiny_options):
    return Config(**tiny_options)


def flags_of(options):
    """Options as a command line."""
    argv = []
    for name, value in options.items():
        argv.append("--" + name.replace("_", "-"))
        if value is True:
            continue
        argv += [str(v) for v in value] if isinstance(value, (tuple, list)) else [str(value)]
    return argv


@pytest.fixture
def as_flags():
    return flags_of
