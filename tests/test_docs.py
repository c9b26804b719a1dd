"""The documentation: every command and every line of Python in it runs, on a tiny model and fewer steps."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

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
            asked = pytest.importorskip("mezo.serve.serve") and []
            monkeypatch.setattr("mezo.serve.http.check_libraries", lambda: None)
            for call in ("serve", "serve_again"):
                monkeypatch.setattr(f"mezo.serve.serve.{call}", lambda *given, asked=asked: asked.append(given) or 0)
            assert main(argv) == 0
            assert "Serving(" in str(asked)
        else:
            assert main(argv) == 0, argv


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
