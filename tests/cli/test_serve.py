"""`mezo serve` and `mezo promote`: what is refused before anything starts."""

import pytest

from mezo.cli.main import main


@pytest.fixture(autouse=True)
def without_server(monkeypatch):
    pytest.importorskip("sglang")
    monkeypatch.setattr("mezo.serve.http.check_libraries", lambda: None)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--port", "65536"], "--port must be from 0 to 65535, got 65536"),
        (["--versions", "1"], "--versions must be from 2 to 64, got 1"),
        (["--max-latency-cost", "-0.1"], "--max-latency-cost must be from 0 to 10"),
        (["--max-latency-cost", "nan"], "--max-latency-cost must be from 0 to 10"),
        (["--user-tokens", "1"], "--user-tokens must be at least 256, got 1"),
        (["--runtime", "hf"], "--runtime hf: mezo serve runs on sglang"),
        (["--trust-reward"], "--trust-reward belongs to --resume"),
        (["--host", "256.0.0.1"], "--host 256.0.0.1"),
    ],
)
def test_options_that_will_not_do_are_named(tmp_path, tiny_data, capsys, more, said):
    run = tmp_path / "run"
    data = ["--train-file", tiny_data["train_file"], "--label-words", " bad", " good"]
    argv = ["serve", "--model", "x", *data, "--output-dir", str(run), "--port", "0", *more]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not run.exists()


def test_a_run_that_nobody_serves_cannot_be_promoted(tmp_path, capsys):
    assert main(["promote", str(tmp_path), "--step", "1"]) == 2
    assert f"mezo serve --resume {tmp_path}" in capsys.readouterr().err


def test_what_is_no_run_cannot_be_resumed(tmp_path, capsys):
    assert main(["serve", "--resume", str(tmp_path)]) == 2
    assert "not a run directory" in capsys.readouterr().err
