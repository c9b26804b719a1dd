"""`make test-versions`: the tests by the oldest and the newest versions of other libraries.

python bench/versions.py --output versions.json [--ends oldest newest] [--tests gates kernels families hf]
python bench/versions.py --output versions.json --whole python3.12 --ends oldest [--paths tests/kernels ...] [--failed]
    [--keep FOLDER]

The first runs the tests that meet other libraries, with this machine's torch: each set of versions is an environment of
its own in a temporary folder, which sees the libraries of this one beneath its own. The second runs every quick test in
an environment that the Python named makes, with that end's torch and all else from the index: gigabytes, since most
builds of torch are for CUDA; --paths divides it into calls of a few minutes. What the file says of other sets, and of
other tests of equal versions, stays.
"""

import argparse
import json
import os
import re
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
    "oldest": {"torch": "2.11.0", "transformers": "5.17.0", "triton": "3.6.0"},
    "newest": {"torch": "2.15.0", "transformers": "5.24.0", "triton": "3.9.0"},
    "triton 3.8": {"triton": "3.8.0"},
}
"""The oldest that pyproject.toml allows, the newest that the registry had when this was last run, a Triton between."""
TESTS = {
    "gates": ["tests/kernels/test_aot.py"],
    "kernels": ["tests/kernels/test_ops.py", "tests/kernels/test_triton.py"],
    "families": ["tests/models/test_every_family.py", "tests/models/test_load.py"],
    "hf": ["tests/runtimes/hf/test_runtime.py", "tests/training/test_classification_head.py"],
}
AGAIN = "failed, again"


def layered(place: Path, pins: dict[str, str]) -> Path:
    """A new environment with these versions, but for torch, over the libraries of this one; its Python."""
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    (Path(own) / "beneath.pth").write_text(sysconfig.get_path("purelib") + "\n")
    wanted = [f"{name}=={number}" for name, number in pins.items() if name != "torch"]
    install = [python, "-m", "pip", "install", "--quiet", "--upgrade-strategy", "only-if-needed", *wanted]
    subprocess.run(install, check=True, stderr=subprocess.DEVNULL)  # what it says of SGLang's pins is known
    return python


def whole(place: Path, pins: dict[str, str], base: str) -> Path:
    """An environment that a Python made, with these versions and what the package asks for; its own Python."""
    python = place / "bin" / "python"
    if not python.exists():
        subprocess.run([base, "-m", "venv", place], check=True)
    wanted = [f"{name}=={number}" for name, number in pins.items()]
    install = [python, "-m", "pip", "install", "--quiet", *wanted, "--editable", f"{ROOT}[dev]"]
    subprocess.run(install, check=True, env=os.environ | {"PIP_CONSTRAINT": os.devnull})  # no cap of this machine's
    return python


def outcome(python: Path, tests: list[str], seconds: int, log: Path, processes: int) -> dict:
    """What pytest says, into a file too, of some tests in an environment; of all if none is named."""
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-rfE", "-m", "not gpu and not slow"]
    paths = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if processes > 1:  # as `make test` does
        command += ["-n", str(processes), "--dist", "loadgroup", "--no-loadscope-reorder"]
    began = time.perf_counter()
    with log.open("w") as file:
        command = ["timeout", str(seconds), *command, *tests]
        code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, env=os.environ | paths).returncode
    return {"tests": tests, **read(log.read_text()), "code": code, "seconds": round(time.perf_counter() - began)}


def read(text: str) -> dict:
    """pytest's last line, its counts, and the names of what failed, of which it says nothing if it was ended."""
    lines = text.strip().splitlines() or [""]
    failed = [line.split(" ", 1)[1].split(" - ")[0] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])}
    return {"summary": lines[-1], **counts, "failed tests": failed}


def versions(python: Path) -> dict[str, str]:
    """Versions of Python, and of the libraries that an environment has."""
    names = ("torch", "triton", "transformers", "tokenizers", "peft", "safetensors", "datasets", "numba", "numpy")
    code = f"""from importlib.metadata import version; import json, platform
print(json.dumps({{"python": platform.python_version()}} | {{n: version(n) for n in {names}}}))"""
    return json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)


def main() -> int:
    """Run; the exit code is 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ends", nargs="+", choices=ENDS, default=list(ENDS))
    parser.add_argument("--tests", nargs="+", choices=TESTS, help="all kinds; with --whole every quick test")
    parser.add_argument("--whole", metavar="PYTHON", help="every quick test, in environments that this Python makes")
    parser.add_argument("--paths", nargs="+", help="with --whole: the quick tests of these files and folders alone")
    parser.add_argument("--failed", action="store_true", help="with --whole: what failed before alone")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="with --whole: where environments are, and stay")
    parser.add_argument("--seconds", type=int, default=3600, help="most seconds for the tests of one kind")
    options = parser.parse_args()
    report = json.loads(options.output.read_text()) if options.output.exists() else {"ends": {}}
    report["machine"], bad = describe(), False
    for end in options.ends:
        with tempfile.TemporaryDirectory() as folder:
            place, row = (options.keep or Path(folder)) / end, f"{end}, whole" if options.whole else end
            python = whole(place, ENDS[end], options.whole) if options.whole else layered(place, ENDS[end])
            found, before = {"versions": versions(python), "outcome": {}}, report["ends"].get(row)
            if before and before["versions"] == found["versions"]:
                found["outcome"] = before["outcome"]
            tests = {name: TESTS[name] for name in options.tests or TESTS}
            if options.failed:
                outcomes = [each for name, each in found["outcome"].items() if name != AGAIN]
                failed = [test for each in outcomes for test in each["failed tests"]]
                names = {name.split("[")[0] for name in failed if "::" in name}  # no whole modules; all parameters
                tests = {AGAIN: sorted(names)} if names else {}
            elif options.paths:
                tests = {" ".join(options.paths): options.paths}
            elif options.whole and not options.tests:
                tests = {"all": []}
            report["ends"][row] = found
            for name in tests:
                log = place / "pytest.txt"
                processes = 2 if options.whole and not options.failed else 1
                found["outcome"][name] = this = outcome(python, tests[name], options.seconds, log, processes)
                if this["code"] != 0:
                    print(log.read_text(), flush=True)
                bad = bad or this["code"] != 0
                print(row, name, this["summary"], flush=True)
                options.output.write_text(json.dumps(report, indent=1) + "\n")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
