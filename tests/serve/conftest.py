"""A server for a file of tests. Without SGLang's server these tests are skipped, unless it is required."""

import importlib.util
import os

import pytest

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
NEEDED = ("sglang", "jsonschema", "soundfile")


@pytest.fixture(scope="session")
def installed():
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing and not os.environ.get("MEZO_REQUIRE_SGLANG"):
        pytest.skip(f"{missing[0]} is not installed: make test installs it")


@pytest.fixture(scope="module")
def options(tiny_model, tiny_data, tmp_path_factory):
    """A run of all layers, so that keys and values depend on theta, with steps that change what is answered."""
    return {
        "model": tiny_model,
        **tiny_data,
        "output_dir": str(tmp_path_factory.mktemp("served") / "run"),
        "prompt": "{text} It was",
        "label_words": (" terrible", " great"),
        "target_modules": LAYERS,
        "num_train": 24,  # six steps an epoch
        "steps": 20,
        "batch_size": 4,
        "lr": 0.02,
        "eps": 0.2,
        "eval_every": 4,
        "report": False,
        "max_latency_cost": 10,
    }
