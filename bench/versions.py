"""`make test-versions`: the tests that meet other libraries, by the oldest and the newest versions of these.

python bench/versions.py --output versions.json [--ends oldest newest] [--tests gates kernels families hf]

Each set of versions is an environment of its own in a temporary folder, which sees the libraries of this one beneath
its own. torch is the one that is installed here unless --torch says otherwise: most builds of it are for CUDA and are
gigabytes. What the file says of other sets, and of other tests of equal versions, stays.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

from machine import describe

ROOT = Path(__file__).parents[1]
ENDS = {
    "oldest": {"transformers": "5.17.0", "triton": "3.6.0"},
    "newest": {"transformers": "5.24.0", "triton": "3.9.0"},
    "triton 3.8": {"triton": "3.8.0"},
}
"""The oldest that pyproject.toml allows, the newest that the registry had when this was last run, a Triton between."""
TESTS = {
    "gates": ["tests/kernels/test_aot.py"],
    "kernels": ["tests/kernels/test_ops.py", "tests/kernels/test_triton.py"],
    "families": ["tests/models/test_every_family.py", "tests/models/test_load.py"],
    "hf": ["tests/runtimes/hf/test_runtime.py", "tests/training/test_classification_head.py"],
}


def environment(place: Path, pins: dict[str, str], torch: str) -> Path:
    """A new environment with these versions over the libraries of this one; its Python."""
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    (Path(own) / "beneath.pth").write_text(sysconfig.get_path("purelib") + "\n")
    wanted = [f"{name}=={number}" for name, number in pins.items()] + ([f"torch=={torch}"] if torch else [])
    install = [python, "-m", "pip", "install", "--quiet", "--upgrade-strategy", "only-if-needed", *wanted]
    subprocess.run(install, check=True, stderr=subprocess.DEVNULL)  # what it says of SGLang's pins is known
    return python


def outcome(python: Path, tests: list[str], seconds: int) -> dict:
    """What pytest says of some tests in an environment: how many passed, and the names of those that did not."""
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", "--tb=line", "-rfE", "-m", "not gpu and not slow"]
    paths = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    try:
        run = subprocess.run(
            [*command, *tests], cwd=ROOT, capture_output=True, text=True, timeout=seconds, env=os.environ | paths
        )
    except subprocess.TimeoutExpired as error:
        dots = (error.stdout or b"").decode().count(".")
        return {"tests": tests, "summary": f"not done after {seconds} s, {dots} passed by then", "failed": None}
    lines = run.stdout.strip().splitlines() or [run.stderr.strip()[-300:]]
    failed = [line.split(" - ")[0].split()[1] for line in lines if line.startswith(("FAILED", "ERROR"))]
    took = time.perf_counter() - began
    return {"tests": tests, "summary": lines[-1], "failed": failed, "code": run.returncode, "seconds": round(took)}


def versions(python: Path) -> dict[str, str]:
    """Versions of the libraries that an environment has."""
    names = ("torch", "triton", "transformers", "tokenizers", "peft", "numba", "numpy")
    code = f"from importlib.metadata import version; import json; print(json.dumps({{n: version(n) for n in {names}}}))"
    return json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)


def main() -> int:
    """Run; the exit code is 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ends", nargs="+", choices=ENDS, default=list(ENDS))
    parser.add_argument("--tests", nargs="+", choices=TESTS, default=list(TESTS))
    parser.add_argument("--torch", default="", help="version of torch to install too, such as 2.11.0+cpu")
    parser.add_argument("--seconds", type=int, default=3600, help="most seconds for the tests of one kind")
    options = parser.parse_args()
    report = json.loads(options.output.read_text()) if options.output.exists() else {"ends": {}}
    report["machine"] = describe()
    for end in options.ends:
        with tempfile.TemporaryDirectory() as folder:
            python = environment(Path(folder), ENDS[end], options.torch)
            found, before = {"versions": versions(python), "outcome": {}}, report["ends"].get(end)
            if before and before["versions"] == found["versions"]:
                found["outcome"] = before["outcome"]
            report["ends"][end] = found
            for name in options.tests:
                found["outcome"][name] = outcome(python, TESTS[name], options.seconds)
                print(end, name, found["outcome"][name]["summary"], flush=True)
                options.output.write_text(json.dumps(report, indent=1) + "\n")
    outcomes = [report["ends"][end]["outcome"][name] for end in options.ends for name in options.tests]
    return int(any(found["failed"] is None or found.get("code") for found in outcomes))


if __name__ == "__main__":
    sys.exit(main())
