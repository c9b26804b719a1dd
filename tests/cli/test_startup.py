"""What a look at the help costs: no library of models, no torch."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["export", "--help"]])
def test_help_imports_no_heavy_library(argv):
    code = f"import sys\nfrom mezo.cli.main import main\ntry: main({argv})\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "peft", "numpy"} & set(done.stdout.splitlines()[-1].split())
