"""Other versions of Triton than the installed one, for tests of what they compile."""

import subprocess
import sys
from pathlib import Path

import pytest

VERSIONS = ("3.6.0", "3.8.0", "3.9.0")
"""That are supported beside the one that is installed."""


def install(version: str, place: Path) -> Path:
    """Put a version into a folder, for PYTHONPATH; skips the test where there is no index with it."""
    options = ["--quiet", "--no-deps", "--target", place, f"triton=={version}"]
    if subprocess.run([sys.executable, "-m", "pip", "install", *options], capture_output=True).returncode:
        pytest.skip(f"triton {version} cannot be installed here")
    return place
