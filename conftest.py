"""Import the ops once, before doctest collection imports each module by its path and registers them again. Modules that
import SGLang are not collected without it, unless it is required; other tests of it say that they are skipped."""

import importlib.util
import os

import mezo_kernels  # noqa: F401

try:
    missing = importlib.util.find_spec("sglang") is None
except ModuleNotFoundError:  # an importer that hides it, as the test of a bare image has
    missing = True
if missing and not os.environ.get("MEZO_REQUIRE_SGLANG"):
    names = ("shared", "test_others", "test_quantization", "test_remote_code", "test_support")
    collect_ignore = ["mezo/runtimes/sglang", "mezo/serve", "tests/bench/test_serve_learning.py"]
    collect_ignore += [f"tests/runtimes/sglang/{name}.py" for name in names]
