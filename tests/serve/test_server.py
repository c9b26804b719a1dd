"""One server that is trained while it is asked: what users see, and what they cannot do."""

import asyncio
import itertools
import json
import os
import random
import resource
import signal
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest

from mezo.cli.main import main
from mezo.run.directory import RunDirectory
from mezo.run.trajectory import read_trajectory
from mezo.serve.learning import MOST_OF_A_BODY
from tests.serve.server import KEY, Reference, Server, left_of
from tests.tiny_data import flags_of

TOLERANCE = 2e-4  # of log-probabilities in float32, on another way through the layers
PROMPTS = ["the film was good It was", "a story It was", "the plot was awful and the acting was fine It was", "nice"]
THREADS, STEPS = 2, 20
FED = [{"text": f"a {word} story", "label": i % 2} for i, word in enumerate(("bad", "fine", "poor", "great"))]
SAID = {"prompt": "the film was good It was", "completion": " great", "score": 1}
CONNECTIONS = 1000


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


def teach(server):
    """Hold training back by signal, feed it, and let it go on; the answers."""
    os.kill(server.process.pid, signal.SIGUSR1)
    before = server.wait_for(lambda status: status["state"] == "paused")
    body = {"model": server.model, "prompt": PROMPTS[0], "max_tokens": 1, "temperature": 0}
    _, answer = server.ask("/v1/completions", body)
    named = {"request_id": answer["id"], "score": 1}
    sent = {"/mezo/examples": FED, "/mezo/feedback": SAID}
    answers = [server.ask(path, body) for path, body in [*sent.items(), ("/mezo/feedback", named)]]
    time.sleep(0.3)
    # a part that was with the engine may have ended a step
    assert server.status()["step"] <= before["step"] + 1
    os.kill(server.process.pid, signal.SIGUSR2)
    server.wait_for(lambda status: status["state"] != "paused")
    return answers


def test_every_answer_is_that_of_the_version_that_it_names(server):
    """Users ask from the first step to the last; each answer is compared with that version in transformers."""
    over, answers, errors, server.done = threading.Event(), [], [], 0
    threads = [threading.Thread(target=hammer, args=(server, over, i, answers, errors)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    try:
        server.taught = teach(server)
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
    # whatever else the engine does for the trainer waits for users too
    assert {"scores", "update", "report", "verify"} <= status["training"]["parts"].keys()


def test_what_users_said_is_kept_and_learnt_from(server):
    rows, said, named = server.taught
    assert rows == (200, {"kept": 4, "examples": 4, "lines": 4})
    assert said == (200, {"kept": 1, "examples": 1, "lines": 5})
    # it was found by its id; what the model says of itself is no label word
    assert named[0] == 400
    assert "completion: it must be one of the label words" in named[1]["error"]
    assert server.status()["fed"] == {"feedback": 1, "example": 4, "refused": 1, "in_use": 5}
    _, records = read_trajectory(server.run / "trajectory.jsonl")
    (joined,) = [record for record in records if record.fed]
    assert (joined.fed[0], joined.step % 6) == (5, 0)
    lines = [json.loads(line) for line in (server.run / "feedback.jsonl").read_text().splitlines()]
    assert all(line["at"] < joined.step for line in lines)
    assert [line["given"] for line in lines] == [*FED, {**SAID, "score": 1.0}]


def test_an_answer_is_judged_by_its_id(server):
    from transformers import AutoTokenizer

    great = AutoTokenizer.from_pretrained(server.model)(" great", add_special_tokens=False)["input_ids"][0]
    body = {"model": f"{server.model}:mezo", "prompt": SAID["prompt"], "max_tokens": 1, "logit_bias": {str(great): 100}}
    code, answer = server.ask("/v1/completions", body)
    assert code == 200, answer
    before = server.status()["fed"]["feedback"]
    assert server.ask("/mezo/feedback", {"request_id": answer["id"], "score": -1})[0] == 200
    line = json.loads((server.run / "feedback.jsonl").read_text().splitlines()[-1])
    assert (line["given"]["prompt"], line["given"]["completion"].strip()) == (SAID["prompt"], "great")
    assert line["examples"][0]["label"] == 0  # the other word
    assert server.status()["fed"]["feedback"] == before + 1


@pytest.mark.parametrize(
    ("path", "body", "code", "said"),
    [
        ("/mezo/feedback", b"{", 400, "the body"),
        ("/mezo/feedback", {"score": 1}, 400, "request_id, or prompt and completion"),
        ("/mezo/feedback", {**SAID, "score": "1"}, 400, "score"),
        ("/mezo/feedback", {**SAID, "completion": "so-so"}, 400, "completion"),
        ("/mezo/feedback", {**SAID, "output_dir": "/tmp"}, 400, "output_dir"),
        ("/mezo/feedback", {"request_id": "x", "score": 1}, 404, "request_id"),
        ("/mezo/examples", {"text": "a film"}, 400, "'label'"),
        ("/mezo/examples", [FED[0], {"label": 1}], 400, "row 1 has no field 'text'"),
        ("/mezo/examples", b"[" + b" " * MOST_OF_A_BODY, 413, "bytes"),
    ],
)
def test_malformed_feedback_is_refused_and_nothing_is_kept(server, path, body, code, said):
    before = (server.run / "feedback.jsonl").read_bytes()
    found, answer = server.ask(path, body)
    assert (found, said in answer["error"]) == (code, True), answer
    assert (server.run / "feedback.jsonl").read_bytes() == before


def test_a_full_disk_refuses_feedback_and_loses_none(server):
    """A limit on the size of the server's files stands for the disk."""
    log = server.run / "feedback.jsonl"
    before, lines = log.read_bytes(), server.status()["fed"]
    limits = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
    try:
        code, answer = server.ask("/mezo/feedback", SAID)
    finally:
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limits)
    assert (code, "free some space" in answer["error"]) == (507, True), answer
    assert (log.read_bytes(), server.status()["fed"]) == (before, lines)
    assert server.ask("/mezo/feedback", SAID)[0] == 200


def test_metrics_say_what_the_status_says(server):
    parser = pytest.importorskip("prometheus_client.parser")
    code, text = server.ask("/mezo/metrics")
    samples = {s.name: s.value for family in parser.text_string_to_metric_families(text) for s in family.samples}
    status = server.status()
    assert (code, samples["mezo_step"], samples["mezo_promoted_step"]) == (200, STEPS, status["promoted"])
    assert samples["mezo_fed_in_use"] == status["fed"]["in_use"]


def test_clients_that_leave_in_the_middle_free_their_versions(server):
    """As many as there are slots leave; all slots can be written anew afterwards."""
    where, before = urlsplit(server.url), server.status()["users"]["requests"]
    for step in range(4):
        body = {"model": f"{server.model}:mezo@{step}", "prompt": "a", "max_tokens": 100, "stream": True,
                "ignore_eos": True}  # fmt: skip
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        with socket.create_connection((where.hostname, where.port), timeout=60) as connection:
            connection.sendall(head.encode() + data)
            seen = b""
            while b"data: " not in seen:
                part = connection.recv(65536)
                assert part, seen
                seen += part
    server.wait_for(lambda status: status["users"]["requests"] >= before + 4)
    for step in range(5, 9):
        assert server.complete(f"mezo@{step}", PROMPTS[0], 1)[0] == f"mezo@{step}"


def test_a_thousand_connections_at_once_are_answered(server):
    where = urlsplit(server.url)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < CONNECTIONS + 200:
        pytest.skip(f"this machine lets a process have {hard} files")
    request = f"GET /mezo/status HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n\r\n"

    async def all_of_them():
        opened = await asyncio.gather(
            *(asyncio.open_connection(where.hostname, where.port) for _ in range(CONNECTIONS))
        )
        for _, writer in opened:
            writer.write(request.encode())
        answers = await asyncio.gather(*(reader.read() for reader, _ in opened))
        for _, writer in opened:
            writer.close()
        return answers

    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, CONNECTIONS + 200), hard))
    try:
        answers = asyncio.run(all_of_them())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert {answer.split(b"\r\n", 1)[0] for answer in answers} == {b"HTTP/1.1 200 OK"}
    assert server.status()["state"] == "finished"


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


def streams(server):
    """Streams that have had their first token."""
    return sum(kind["n"] for kind in server.status()["users"]["seconds_waited"]["first_token"].values())


def test_a_stream_says_the_same(server):
    body = {"model": f"{server.model}:mezo", "prompt": PROMPTS[1], "max_tokens": 5, "temperature": 0, "stream": True}
    before = streams(server)
    code, text = server.ask("/v1/completions", body)
    _, tokens, _ = server.complete("mezo", PROMPTS[1], 5)
    assert (code, text.rstrip()[-6:]) == (200, "[DONE]")
    assert [token for token in tokens if token.strip() in text] == list(tokens)
    assert streams(server) == before + 1


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
    ours += [("/mezo/metrics", None), ("/mezo/feedback", SAID), ("/mezo/examples", FED)]
    before = server.status()["fed"]
    for (path, body), key in itertools.product([*ours, ("/v1/models", None)], (None, "wrong")):
        assert server.ask(path, body, key=key)[0] == 401, path
    assert (server.status()["state"], server.status()["fed"]) == ("finished", before)


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
