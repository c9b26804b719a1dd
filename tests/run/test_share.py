"""`mezo push`: the folder that is shared holds what a stranger needs to use and to rebuild it."""

import json
import os

import pytest
import yaml

from mezo.api import train
from mezo.cli.main import main
from mezo.config import Config
from mezo.run.adapter import read_adapter


@pytest.fixture
def run(tiny_options):
    options = {**tiny_options, "steps": 4, "eval_every": 2, "noise": False}
    train(Config.of(**options))
    return options["output_dir"]


def test_a_shared_folder_rebuilds_its_adapter(run, tmp_path, capsys):
    folder = tmp_path / "share"
    assert main(["push", run, "--output-dir", str(folder)]) == 0
    assert main(["replay", str(folder / "run"), "--output-dir", str(tmp_path / "again")]) == 0
    shared, again = read_adapter(folder), read_adapter(tmp_path / "again")
    assert shared.keys() == again.keys()
    assert all(again[name].equal(tensor) for name, tensor in shared.items())
    card = (folder / "README.md").read_text()
    known = yaml.safe_load(card.split("---")[1])
    assert known == {"tags": ["mezo"], "library_name": "peft"}, "a base on a disk has no id"
    header = json.loads((folder / "run" / "trajectory.jsonl").read_text().splitlines()[0])
    assert header["data_hash"] in card
    assert "| test | accuracy | " in card
    assert "mezo replay run --output-dir replayed" in card
    written = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert len(written) >= 6
    assert not [path for path in written if str(tmp_path.parent) in path.read_text()], "no path of this machine"
    config = json.loads((folder / "run" / "config.json").read_text())
    assert (config["train_file"], config["output_dir"]) == ("train.jsonl", "run")


def test_what_is_sent_to_the_hub(run, monkeypatch, capsys):
    sent = {}

    class Api:
        def create_repo(self, repo, **options):
            sent["made"] = (repo, options)

        def upload_folder(self, repo_id, folder_path, commit_message):
            sent["files"] = sorted(os.listdir(folder_path))
            return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert main(["push", run, "--repo", "me/films", "--private"]) == 0
    assert sent["made"] == ("me/films", {"private": True, "exist_ok": True})
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "run"} <= set(sent["files"])
    monkeypatch.setattr(Api, "create_repo", lambda *a, **k: (_ for _ in ()).throw(OSError("401\nunauthorised")))
    assert main(["push", run, "--repo", "me/films"]) == 2
    assert "the hub refused it (401 unauthorised)" in capsys.readouterr().err


def test_what_cannot_be_shared_is_one_line(run, tmp_path, capsys):
    for argv, message in (
        ([run], "give --repo OWNER/NAME, or --output-dir"),
        ([run, "--output-dir", run], "exists and is never overwritten"),
        ([str(tmp_path / "gone"), "--output-dir", str(tmp_path / "x")], "no such file"),
    ):
        assert main(["push", *argv]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "run" / "result.json").unlink()
    assert main(["push", run, "--output-dir", str(tmp_path / "x")]) == 2
    assert "is not finished: mezo train --resume" in capsys.readouterr().err
