"""One server that is trained while it is asked: what users see, and what they cannot do."""

import itertools
import random
import threading
import time

import pytest

from mezo.cli.main import main
from mezo.run.directory import RunDirectory
from mezo.run.trajectory import read_trajectory
from tests.serve.server import KEY, Reference, Server, left_of
from tests.tiny_data import flags_of

TOLERANCE = 2e-4  # of log-probabilities in float32, on another way through the layers
PROMPTS = ["the film was good It was", "a story It was", "the plot was awful and the acting was fine It was", "nice"]
THREADS, STEPS = 2, 20


@pytest.fixture(scope="module")
def server(installed, options):
    started = Server(flags_of(options), options["output_dir"])
    yield started
    if started.process.poll() is None:
        assert started.end() in (0, 143), started.output


def hammer(server, seconds_are_over, seed, answers, errors):
    """Ask for the base, the promoted version and pinned steps at random until the training is over."""
    rng = random.Random(seed)
    while not seconds_are_over.is_set():
        time.sleep(rng.random() / 20)
        step = server.done and rng.randrange(0, server.done, 3)
        adapter = rng.choice(("", "mezo", "mezo", f"mezo@{step}"))
        prompt, tokens = rng.choice(PROMPTS), rng.choice((1, 4, 12))
        try:
            version, *answer = server.complete(adapter, prompt, tokens)
            answers.append((adapter, version, prompt, *answer))
        except AssertionError as error:
            errors.append(str(error))


def test_every_answer_is_that_of_the_version_that_it_names(server):
    """Users ask from the first step to the last; each answer is compared with that version in transformers."""
    over, answers, errors, server.done = threading.Event(), [], [], 0
    threads = [threading.Thread(target=hammer, args=(server, over, i, answers, errors)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    try:
        while (status := server.status())["state"] == "training":
            server.done = status["step"]
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert (status["state"], status["step"]) == ("finished", STEPS), server.output
    # all slots may be pinned at once, which is said; nothing else goes wrong
    assert all("versions at hand are in use" in error for error in errors), errors
    reference = Reference(server.run)
    wrong = [a for a in answers if not reference.difference(a[1], *a[2:]) <= TOLERANCE]
    assert not wrong
    assert all(version == {"": "base"}.get(adapter, adapter) for adapter, version, *_ in answers if adapter != "mezo")
    versions = {version for _, version, *_ in answers}
    assert len(versions) > 3
    assert len({version for adapter, version, *_ in answers if adapter == "mezo"}) > 1
    # the check would see a perturbed copy: what was measured at the steps meanwhile answers otherwise
    step = max(int(version.partition("@")[2]) for version in versions - {"base"}) - 1
    perturbed = [reference.difference(f"plus@{max(step, 0)}", *answer[2:]) for answer in answers]
    assert min(perturbed) > 10 * TOLERANCE


def test_versions_that_are_promoted_are_the_best_on_dev(server):
    status = server.status()
    best = [row["step"] for row in RunDirectory(server.run).read_metrics() if row.get("is_best")]
    assert status["promotions"] == [0, *best]
    assert status["promoted"] == best[-1] > 0
    assert [row["step"] for row in status["dev"]] == list(range(0, STEPS + 1, 4))
    assert min(status["users"]["requests"], status["training"]["tokens"]["steps"]) > 10


def test_models_that_can_be_named_are_listed(server):
    code, models = server.ask("/v1/models")
    names = [each["id"] for each in models["data"]]
    assert (code, names[:2]) == (200, [server.model, f"{server.model}:mezo"])
    assert all(name.removeprefix(server.model).split("@")[0] in ("", ":mezo") for name in names)


def test_a_step_is_promoted_by_hand_and_rolled_back(server, monkeypatch, capsys):
    monkeypatch.setenv("MEZO_API_KEY", KEY)
    before = server.status()["promoted"]
    for step in (3, before):
        assert main(["promote", str(server.run), "--step", str(step)]) == 0
        assert f"step {step}, rebuilt in" in capsys.readouterr().out
        assert server.status()["promoted"] == step
        version, *answer = server.complete("mezo", PROMPTS[0], 4)
        assert version == f"mezo@{step}"
        assert Reference(server.run).difference(version, PROMPTS[0], *answer) <= TOLERANCE
    assert main(["promote", str(server.run), "--step", "21"]) == 2
    assert "has 20 steps" in capsys.readouterr().err
    monkeypatch.delenv("MEZO_API_KEY")
    assert main(["promote", str(server.run), "--step", "3"]) == 2
    assert "--api-key" in capsys.readouterr().err


def test_a_stream_says_the_same(server):
    body = {"model": f"{server.model}:mezo", "prompt": PROMPTS[1], "max_tokens": 5, "temperature": 0, "stream": True}
    code, text = server.ask("/v1/completions", body)
    _, tokens, _ = server.complete("mezo", PROMPTS[1], 5)
    assert (code, text.rstrip()[-6:]) == (200, "[DONE]")
    assert [token for token in tokens if token.strip() in text] == list(tokens)
    waits = server.status()["users"]["seconds_waited"]["first_token"]
    assert sum(kind["n"] for kind in waits.values()) == 1


@pytest.mark.parametrize(
    "name", ["plus0", "minus0", "served0", "mezo@", "mezo@-1", "mezo@1e3", "mezo@21", "other", "../x"]
)
def test_no_slot_and_no_step_that_is_not_there_can_be_named(server, name):
    body = {"prompt": "a film", "max_tokens": 1}
    for more in ({"model": f"{server.model}:{name}"}, {"model": server.model, "lora_path": name}):
        code, answer = server.ask("/v1/completions", body | more)
        assert code == 400, answer
        assert "not served" in str(answer) or "has 20 steps" in str(answer)
    code, answer = server.ask("/generate", {"text": "a film", "lora_path": name})
    assert code == 400, answer


def test_a_lora_id_of_the_engine_is_not_taken(server):
    """The native endpoint has a field for it, by which a slot could be named past the gate."""
    sampling = {"max_new_tokens": 3, "temperature": 0}
    asked = ({"text": PROMPTS[0], "sampling_params": sampling, **more} for more in ({}, {"lora_id": "0" * 32}))
    answers = [server.ask("/generate", body) for body in asked]
    assert [code for code, _ in answers] == [200, 200]
    assert answers[0][1]["output_ids"] == answers[1][1]["output_ids"]


def test_namespaces_of_users_are_not_the_trainers(server):
    for salt in ("mezo-1", "mezo-served-0", "x"):
        version, *answer = server.complete("mezo", PROMPTS[2], 4, cache_salt=salt, extra_key=salt)
        assert Reference(server.run).difference(version, PROMPTS[2], *answer) <= TOLERANCE


@pytest.mark.parametrize(
    "path",
    ["/flush_cache", "/load_lora_adapter", "/unload_lora_adapter", "/update_weights_from_disk", "/abort_request"],
)
def test_endpoints_that_would_change_the_engine_are_refused(server, path):
    code, answer = server.ask(path, {"lora_name": "plus0"})
    assert code == 403, answer
    assert "not offered" in answer["error"]


def test_the_key_guards_every_endpoint(server):
    ours = [("/mezo/status", None), ("/mezo/promote", {"step": 1}), ("/mezo/pause", {}), ("/mezo/resume", {})]
    for (path, body), key in itertools.product([*ours, ("/v1/models", None)], (None, "wrong")):
        assert server.ask(path, body, key=key)[0] == 401, path
    assert server.status()["state"] == "finished"


@pytest.mark.parametrize(
    "body", [{}, {"step": "1"}, {"step": -1}, {"step": 1.5}, {"step": 1, "path": "/etc"}, [], b"{", {"step": 10**12}]
)
def test_malformed_bodies_are_refused(server, body):
    code, answer = server.ask("/mezo/promote", body)
    assert code == 400, answer


def test_the_log_rebuilds_what_the_run_kept(server):
    assert len(read_trajectory(server.run / "trajectory.jsonl")[1]) == STEPS
    assert main(["trajectory", "verify", str(server.run)]) == 0
    out = server.run.parent / "replayed"
    assert main(["replay", str(server.run), "--output-dir", str(out)]) == 0
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (server.run / "adapter" / name).read_bytes()


def test_it_ends_and_leaves_nothing(server):
    below = server.processes()
    assert server.end() == 143
    assert not left_of(below)
    assert not (server.run / "serve.json").exists()
