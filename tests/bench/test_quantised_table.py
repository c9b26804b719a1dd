"""The table of quantised bases in README and in the documentation is that of the measured file."""

import json
from pathlib import Path

import pytest
from quantization import BETWEEN, markdown

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "bench/results/cpu-2core-amd-epyc/quantization.json"


@pytest.mark.parametrize("page", ["README.md", "docs/how-to/quantised-base.md"])
def test_the_table_is_the_files(page):
    whole = json.loads(MEASURED.read_text())
    found = BETWEEN.search((ROOT / page).read_text())[0].split("\n", 1)[1].rsplit("\n", 1)[0]
    assert found == markdown(whole)
    assert {"float32", "bfloat16", "int8", "nf4"} <= set(whole["rows"])
