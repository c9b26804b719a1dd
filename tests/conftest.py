"""What tests share: threads, Triton's interpreter where there is no GPU, a tiny model and data, and a run of them."""

import os

import pytest
import torch

# what else is needed is imported where it is: the tests of the kernels run where only torch and Triton are installed

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # chosen before a kernel module is imported

# tiny work on two threads is slower than on one, and many times slower when the other core is busy
torch.set_num_threads(1)


LONG = ("runtimes/sglang", "tests/serve", "kernels/ptx", "kernels/test_aot")
ENGINES = ("runtimes/sglang", "tests/serve/test_server")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items):
    """In several processes (pytest-xdist) the tests of a file stay together, and all that share engines: two at once
    would fill the machine. What takes longest begins first, so that no process waits for it at the end."""
    for item in items:
        path = item.path.as_posix()
        item.add_marker(pytest.mark.xdist_group("engines" if any(each in path for each in ENGINES) else path))
    items.sort(key=lambda item: next((i for i, name in enumerate(LONG) if name in item.path.as_posix()), len(LONG)))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    from tests.tiny_models import save  # transformers takes seconds to import: tests of the kernels do without

    return save("llama", tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    from tests.tiny_data import write_jsonl

    directory = tmp_path_factory.mktemp("data")
    sizes = {"train": 48, "dev": 20, "test": 20}
    return {f"{s}_file": write_jsonl(directory / f"{s}.jsonl", n, i) for i, (s, n) in enumerate(sizes.items())}


@pytest.fixture
def tiny_options(tiny_model, tiny_data, tmp_path):
    """Options of a 40-step run: last-layer LoRA, evaluated every 10 steps, without the page, which takes as long."""
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
        "report": False,
    }


@pytest.fixture
def tiny_config(tiny_options):
    from mezo.config import Config

    return Config.of(**tiny_options)


@pytest.fixture
def as_flags():
    from tests.tiny_data import flags_of

    return flags_of
