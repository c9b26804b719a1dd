"""The README's Python runs as it stands, and the files it points to are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_examples_run_and_learn():
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(block, namespace)
    model, x, y = namespace["model"], namespace["x"], namespace["y"]
    assert (model(x).argmax(1) == y).float().mean() > 0.8
    assert not namespace["plus"].tensors[0].equal(namespace["minus"].tensors[0])


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_proofs_named_in_the_tables_exist():
    """A name without a folder is of the folder named before it in its row."""
    checked = 0
    for row in re.findall(r"^\|.*\|$", TEXT, re.MULTILINE):
        folder = None
        for name in re.findall(r"`((?:tests/)?(?:[\w.]+/)*(?:test_\w+\.py|(?<=/)))`", row):
            path = ROOT / name if "/" in name else folder / name
            assert path.is_file() or (name.endswith("/") and path.is_dir()), name
            folder, checked = path.parent, checked + 1
    assert checked == len(re.findall(r"`[^`]*(?:test_\w+\.py|tests/)[^`]*`", TEXT)) > 20
