"""Atomic writes: an error leaves what was there, and nothing else."""

import resource

import pytest
import torch

from mezo.atomic import SCRATCH, remove_partial, replacing
from mezo.run.adapter import read_adapter, save_adapter
from mezo.run.files import replace_file


def listing(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    replace_file(path, b"first")
    with pytest.raises(ZeroDivisionError), replacing(path) as part:
        part.write_bytes(b"half" * (1 // 0 if part.write_bytes(b"half") else 1))
    assert (path.read_bytes(), listing(tmp_path)) == (b"first", ["file"])
    replace_file(path, b"second")
    assert (path.read_bytes(), listing(tmp_path)) == (b"second", ["file"])


def write(part, name):
    part.mkdir()
    (part / name).touch()


def test_a_directory_with_something_in_it_gives_way_only_where_it_may(tmp_path):
    path = tmp_path / "directory"
    with replacing(path) as part:
        write(part, "first")
    with pytest.raises(OSError, match="not empty"), replacing(path) as part:
        write(part, "second")
    assert (listing(path), listing(tmp_path)) == (["first"], ["directory"])
    with replacing(path, old=True) as part:
        write(part, "second")
    assert (listing(path), listing(tmp_path)) == (["second"], ["directory"])


def test_what_killed_processes_left_is_removed_by_name(tmp_path):
    for name in ("a", "a.b"):
        write(tmp_path / f"{SCRATCH}{name}-xyz", "half")
    remove_partial(tmp_path, "a")
    assert listing(tmp_path) == [f"{SCRATCH}a.b-xyz"]
    remove_partial(tmp_path)
    assert listing(tmp_path) == []


def test_an_adapter_that_finds_no_room_is_an_error_of_the_system_and_leaves_the_former(tmp_path):
    """A limit on the size of a file stands for a full disk: the command says it in one line, and how to go on."""
    theta = {"base_model.model.q_proj.lora_A.weight": torch.ones(4, 4)}
    save_adapter(tmp_path, {"r": 4}, theta)
    before, larger = listing(tmp_path), {name: torch.ones(4, 4096) for name in theta}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: .*adapter_model\.safetensors") as error:
            save_adapter(tmp_path, {"r": 4}, larger)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.strerror == "File too large"
    assert listing(tmp_path) == before
    assert torch.equal(*(next(iter(each.values())) for each in (read_adapter(tmp_path), theta)))
