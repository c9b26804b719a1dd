"""A server of the tiny model as a process of its own, and what its users and its log say."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import torch

from mezo.models.parts import load_parts
from mezo.run.directory import RunDirectory
from mezo.run.header import initial_theta
from mezo.run.replay import theta_after
from mezo.run.trajectory import read_trajectory

KEY = "of the tests"
STARTING = 600.0


class Server:
    """`mezo serve` as a process.

    Args:
        arguments: of the command.
        run: its run directory.
    """

    def __init__(self, arguments, run):
        self.run, self.log = Path(run), Path(f"{run}.log")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "MEZO_API_KEY": KEY}
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "mezo", "serve", *arguments, "--port", "0"]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + STARTING
        while not (self.run / "serve.json").is_file():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.1)
        self.url = json.loads((self.run / "serve.json").read_text())["url"]

    @property
    def output(self):
        return self.log.read_text()

    def ask(self, path, body=None, key=KEY, timeout=120):
        """(status, answer) of a request; POST if there is a body."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=timeout) as got:
                text, status = got.read(), got.status
        except urllib.error.HTTPError as error:
            text, status = error.read(), error.code
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text.decode()

    def status(self):
        code, status = self.ask("/mezo/status")
        assert code == 200, status
        return status

    def wait_for(self, condition, seconds=120):
        """The first status that meets a condition."""
        deadline = time.monotonic() + seconds
        while not condition(status := self.status()):
            assert time.monotonic() < deadline, status
            time.sleep(0.1)
        return status

    def complete(self, adapter, prompt, tokens=6, **others):
        """(version that answered, token ids, their log-probabilities) of a greedy completion."""
        model = self.model + (f":{adapter}" if adapter else "")
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 1, **others}
        code, answer = self.ask("/v1/completions", body)
        assert code == 200, answer
        logprobs = answer["choices"][0]["logprobs"]
        return answer["metadata"]["weight_version"], tuple(logprobs["tokens"]), logprobs["token_logprobs"]

    @property
    def model(self):
        return json.loads((self.run / "config.json").read_text())["model"]

    def end(self, seconds=60):
        """End it as a service manager does; its exit code."""
        self.process.terminate()
        return self.process.wait(seconds)

    def processes(self):
        """Ids of processes that belong to it: descendants that are no zombies."""
        return [each.pid for each in psutil.Process(self.process.pid).children(recursive=True)]


class Reference:
    """What each version answers, by transformers and PEFT in this process.

    Args:
        run: directory of the run.
    """

    def __init__(self, run):
        from transformers import AutoTokenizer

        directory = RunDirectory(Path(run))
        config = directory.read_config()
        self.path = directory.path
        self.first_line, self.records = read_trajectory(directory.trajectory)
        self.parts, _ = load_parts(config.model, torch.device("cpu"), torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(config.model.base)
        self.eps, self.made = config.method.eps, {}

    def theta(self, version):
        """Of "base", "mezo@STEP", or "plus@STEP": what is perturbed at a step."""
        name, _, step = version.partition("@")
        if name == "base":
            return initial_theta(self.first_line)  # lora_B is zero
        theta = theta_after(self.first_line, self.path, self.records[: int(step)])
        if name == "plus":
            from mezo_kernels import ParamLayout, perturb_

            perturb_(ParamLayout(theta), self.eps, self.records[int(step)].update.seeds[0])
        return theta

    def difference(self, version, prompt, tokens, logprobs):
        """Largest difference of the log-probabilities from a version's; inf where a token is not the likeliest."""
        if version not in self.made:
            self.made[version] = {n: t.clone() for n, t in self.theta(version).items()}
        model, params = self.parts.model, self.parts.params
        for name, tensor in self.made[version].items():
            params[name].data.copy_(tensor)
        ids = self.tokenizer(prompt)["input_ids"]
        written = [self.tokenizer.convert_tokens_to_ids(token.strip()) for token in tokens]
        with torch.no_grad():
            logits = model(torch.tensor([ids + written])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        own = logits[range(len(written)), written]
        if (logits.max(-1).values - own).max() > 1e-4:  # another token was likelier
            return float("inf")
        return float((own - torch.tensor(logprobs)).abs().max())


def left_of(pids, seconds=60):
    """Those of some processes that do not end by themselves, zombies included."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if psutil.pid_exists(pid)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left
