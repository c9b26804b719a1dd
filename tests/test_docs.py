"""The documentation: every command and every line of Python in it runs, on a tiny model and fewer steps."""

import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mezo.cli.main import COMMANDS, main
from tests.tiny_data import write_jsonl
from tests.tiny_models import WORDS, save

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
BLOCK = re.compile(r"```(\w+)([^\n]*)\n(.*?)```", re.DOTALL)
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FEWER = 25  # times fewer steps than a page says
ELSEWHERE = {
    "mezo verify": "tests/kernels/test_verify.py",
    "mezo promote runs/served --step 120": "tests/serve/test_server.py",
}
"""Commands that take long or need a server, and the test that runs them."""
PROGRAMS = ("accelerate", "make", "mezo", "pip", "python", "torchrun")
OF_A_CLONE = {
    "pip install .": "bench/dist.py",
    "pip install torch --index-url https://download.pytorch.org/whl/cpu": "bench/dist.py",
    "make demo": "bench/results/cpu-2core-amd-epyc/demo.json",
    "mezo train --runtime sglang --tp 16 --engine-arg nnodes=2 node_rank=0 dist_init_addr=HOST:PORT ...": (
        "tests/runtimes/sglang/test_nodes.py"
    ),
}
"""Commands in blocks of text that need more than this process, and what runs them or came of them."""
RANKS = "how-to/several-processes.md"


def blocks(page, kind):
    """(options after the kind, text) of the blocks of a page."""
    return [(options, text) for name, options, text in BLOCK.findall((DOCS / page).read_text()) if name == kind]


def commands(page, model):
    """Command lines of a page, without `mezo`, for the tiny model."""
    for _, text in blocks(page, "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            program, *argv = shlex.split(line)
            assert program == "mezo", f"{page}: only mezo commands are run: {line}"
            if line not in ELSEWHERE:
                fewer = [
                    str(int(n) // FEWER) if flag in STEPS else n for flag, n in zip(["", *argv], argv, strict=False)
                ]
                yield [model if word == MODEL else word for word in fewer]


STEPS = ("--steps", "--until", "--step")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(path of a tiny model, a folder with the files and the runs that pages speak of)."""
    folder = tmp_path_factory.mktemp("docs")
    model = save("llama", folder / "model", vocab_size=len(WORDS) + 3)
    work = folder / "work"
    work.mkdir()
    for i, split in enumerate(("train", "dev", "test")):
        write_jsonl(work / f"{split}.jsonl", 24, i)
    options = [{"prompt": "the film was", "options": [" good", " bad"], "answer": i % 2} for i in range(16)]
    prompts = [{"prompt": f"the {word} was"} for word in WORDS[:16]]
    for name, rows in {"options": options, "prompts": prompts}.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        (train, *_) = commands("quickstart.md", model)
        assert train[0] == "train"
        assert main(train) == 0
    shutil.copytree(work / "runs/first", work / "runs/second")
    return model, work


@pytest.mark.parametrize("page", [page for page in PAGES if "```sh" in (DOCS / page).read_text()])
def test_commands_of_a_page_run(page, prepared, tmp_path, monkeypatch):
    model, work = prepared
    shutil.copytree(work, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    if page == "quickstart.md":
        shutil.rmtree("runs/first")
    for options, text in blocks(page, "python"):
        if title := re.search(r'title="(.*?)"', options):
            Path(title[1]).write_text(text)
    for argv in commands(page, model):
        if "--quantization" in argv:
            pytest.importorskip("torchao", reason="torchao is not installed")
        if "--runtime" in argv:  # what is asked for is read and checked; tests/runtimes/sglang/ starts engines
            asked = []
            for call in ("mezo.api.train", "mezo.api.resume"):
                monkeypatch.setattr(call, lambda *given, asked=asked, **options: asked.append((given, options)))
            assert main(argv) == 130
            assert "SGLang(" in str(asked) or "'sglang'" in str(asked)
        elif argv[0] == "serve":  # tests/serve/ starts servers
            pytest.importorskip("sglang")
            asked = []
            monkeypatch.setattr("mezo.serve.http.check_libraries", lambda: None)
            for call in ("serve", "serve_again"):
                monkeypatch.setattr(f"mezo.serve.serve.{call}", lambda *given, asked=asked: asked.append(given) or 0)
            assert main(argv) == 0
            assert "Serving(" in str(asked)
        else:
            assert main(argv) == 0, argv


def spelt_out(page):
    """Command lines in a page's blocks of text, which are run as they stand, by a shell."""
    lines = [line for _, text in blocks(page, "text") for line in text.replace("\\\n", " ").splitlines()]
    return [" ".join(line.split()) for line in lines if line.split(" ")[0] in PROGRAMS]


def test_programs_beside_mezo_are_run_too():
    """Below, or where the table says."""
    lines = {page: spelt_out(page) for page in PAGES}
    run = [*lines.pop("how-to/from-python.md"), *(line for line in lines[RANKS] if line.startswith("torchrun"))]
    assert {line for page in lines.values() for line in page} - set(run) == set(OF_A_CLONE)
    for place in (*OF_A_CLONE.values(), *ELSEWHERE.values()):
        assert (DOCS.parent / place).is_file(), place


def test_the_program_of_the_trainer_runs_and_its_log_gives_the_model(prepared, tmp_path, monkeypatch):
    model, _ = prepared
    monkeypatch.chdir(tmp_path)
    program, replay = map(shlex.split, spelt_out("how-to/from-python.md"))
    monkeypatch.setattr("sys.argv", [program[1], model])
    runpy.run_path(str(DOCS.parent / program[1]), run_name="__main__")
    assert main(replay[1:]) == 0
    trained, rebuilt = (read(folder) for folder in ("runs/trainer/checkpoint-200", "rebuilt"))
    assert trained.keys() == rebuilt.keys()
    assert all(torch.equal(trained[name], rebuilt[name]) for name in trained)


def read(folder):
    """The weights in a folder of transformers'."""
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.slow  # training/test_ranks.py and trainer/test_ranks.py start ranks; here the page's own lines do
def test_programs_of_several_processes_run(prepared, tmp_path):
    """With two processes for four; two machines are two launches, which meet at an address."""
    model, work = prepared
    shutil.copytree(work, tmp_path / "work")
    one, two, trainer = (line for line in spelt_out(RANKS) if line.startswith("torchrun"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        two = two.replace("HOST:29500", f"127.0.0.1:{free.getsockname()[1]}")
    two = two.replace("...", one.partition("-m mezo train ")[2].replace("runs/ranks", "runs/machines"))
    launch(tmp_path / "work", model, one + " --steps 8 --no-report")
    launch(tmp_path / "work", model, two + " --steps 8 --no-report", machines=2)
    launch(tmp_path / "work", model, trainer)
    losses = [json.loads((tmp_path / f"work/runs/{run}/result.json").read_text()) for run in ("ranks", "machines")]
    assert [result["steps"] for result in losses] == [8, 8]
    assert (tmp_path / "work/runs/trainer/checkpoint-200/trainer_state.json").is_file()


def launch(work, model, line, machines=1):
    """Run a line of torchrun's in a folder, two processes in all, as often as there are machines."""
    line = line.replace("--nproc-per-node 4", f"--nproc-per-node {2 // machines}").replace(MODEL, model)
    _, *argv = shlex.split(line.replace("examples/", f"{DOCS.parent}/examples/"))
    command = [sys.executable, "-m", "torch.distributed.run", *([] if machines > 1 else ["--standalone"]), *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(DOCS.parent)}
    started = [
        subprocess.Popen(command, cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(machines)
    ]
    said = [process.communicate()[0].decode() for process in started]
    assert [process.returncode for process in started] == [0] * machines, said


def test_python_that_trains_a_language_model_runs(prepared, tmp_path, monkeypatch):
    """Blocks called py: those called python need no model."""
    model, _ = prepared
    monkeypatch.chdir(tmp_path)
    texts = [text for page in PAGES for _, text in blocks(page, "py")]
    assert texts
    for text in texts:
        exec(
            text.replace(MODEL, model)
            .replace("steps=100", "steps=4")
            .replace("Dull.", "bad")
            .replace("A fine", "a good"),
            {},
        )


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in (DOCS / page).read_text()])
def test_python_of_a_page_runs(page):
    for _, text in blocks(page, "python"):
        exec(text, {})


def test_lines_of_data_are_json():
    lines = [line for page in PAGES for _, text in blocks(page, "json") for line in text.splitlines()]
    assert len(lines) >= 4
    assert all(isinstance(json.loads(line), dict) for line in lines)


def test_links_lead_somewhere_and_every_page_is_in_the_menu():
    """As `make docs` checks, without its packages."""
    menu = re.findall(r"- ([\w/-]+\.md)", (DOCS.parent / "mkdocs.yml").read_text())
    assert sorted(menu) == PAGES
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", (DOCS / page).read_text()):
            assert target.startswith("https://") or (DOCS / page).parent.joinpath(target).is_file(), (page, target)


def test_the_page_of_commands_has_the_help_of_every_command(monkeypatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location("commands", DOCS / "commands.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    monkeypatch.setattr(hook, "help_of", lambda name: f"usage of {name}\n")
    text = hook.on_page_markdown((DOCS / "reference/commands.md").read_text())
    assert all(f"usage of {name}" in text for group in COMMANDS.values() for name in group)
    assert hook.on_page_markdown("other") == "other"
