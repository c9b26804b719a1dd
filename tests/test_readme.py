"""The README's Python runs as it stands, and the files it points to are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_examples_run_and_learn():
    namespace, found = {}, []
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(block, namespace)
        model, x, y = namespace["model"], namespace["x"], namespace["y"]
        found.append(float((model(x).argmax(1) == y).float().mean()))
    assert len(found) == 2
    assert min(found) > 0.8


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_proofs_named_in_the_tables_exist():
    """By whole paths: a name alone would be checked by nobody."""
    named = re.findall(r"`([\w./]*test_\w+\.py|tests/[\w/]*)`", TEXT)
    assert len(named) > 20
    for name in named:
        assert (ROOT / name).exists(), name
