"""`make dist`: wheel and sdist, and what the install page says, run from the wheel in an environment of its own.

python bench/dist.py [--output dist] [--whole [base trainer quantization sglang]] [--results FILE.json]

The environment is new and holds the wheel alone; libraries are those of the Python that runs this, since they are
gigabytes. With --whole pip installs them from the index, as a user's would: an environment for the package alone, and
one for each extra. In all but the last torch comes first, of the version that `make` pins, as the page says, so that a
machine without a GPU gets the build that it has. With sglang it is what SGLang pins, a build for CUDA: 11 GB in all.
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
import zipfile
from importlib.metadata import version
from pathlib import Path

from machine import describe

ROOT = Path(__file__).parents[1]
EXTRAS = {"base": "", "trainer": "[trainer,dev]", "quantization": "[quantization]", "sglang": "[sglang]"}
"""Environments of --whole, and what is written behind the wheel's name."""
SHOWN = ("torch", "triton", "numba", "transformers", "peft", "datasets", "trl", "torchao", "bitsandbytes", "sglang")
"""Packages whose versions are kept."""
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
"""A new environment sees nothing of the tree."""


def build(output: Path) -> tuple[Path, Path]:
    """The wheel, made from the sdist, and the sdist."""
    output.mkdir(parents=True, exist_ok=True)
    code = f"from setuptools import build_meta as b; print(b.build_sdist({str(output.absolute())!r}))"
    name = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    sdist = output / name.strip().splitlines()[-1]
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(output), str(sdist)]
    subprocess.run(pip, check=True)
    return max(output.glob("*.whl"), key=lambda path: path.stat().st_mtime), sdist


def check_content(wheel: Path) -> None:
    """Both packages with their types, and nothing of the tests."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"mezo", "mezo_kernels"}, tops
    for package in sorted(tops):
        assert f"{package}/py.typed" in names, package
        source = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        assert source <= set(names), sorted(source - set(names))


def install(wheel: Path, place: Path) -> Path:
    """A new environment with the wheel, beside the libraries of this one; its Python."""
    python = new_environment(place)
    run = [python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(run, check=True, env=ENVIRONMENT)
    (libraries_of(python) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def new_environment(place: Path) -> Path:
    """The Python of a new environment, which holds pip alone."""
    venv.create(place, with_pip=True)
    return place / "bin" / "python"


def libraries_of(python: Path) -> Path:
    """The folder that an environment's packages are in."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    run = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True, env=ENVIRONMENT)
    return Path(run.stdout.strip())


def install_whole(wheel: Path, place: Path, extra: str) -> tuple[Path, dict]:
    """A new environment with the wheel and all that it asks for, from the index.

    Returns:
        Its Python, and what it took: seconds, bytes on the disk, packages, what `pip check` says.
    """
    python, began = new_environment(place), time.perf_counter()
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    if extra != "sglang":
        subprocess.run([*pip, f"torch=={version('torch').partition('+')[0]}"], check=True, env=ENVIRONMENT)
    subprocess.run([*pip, f"{wheel}{EXTRAS[extra]}"], check=True, env=ENVIRONMENT)
    seconds = time.perf_counter() - began
    check, listed = (
        subprocess.run([python, "-m", "pip", *words], capture_output=True, text=True, env=ENVIRONMENT).stdout
        for words in (["check"], ["list", "--format=json"])
    )
    packages = {each["name"]: each["version"] for each in json.loads(listed)}
    size = sum(path.lstat().st_size for path in place.rglob("*") if path.is_file())
    return python, {
        "seconds_install": round(seconds, 1),
        "bytes": size,
        "packages": len(packages),
        "versions": {name: packages[name] for name in SHOWN if name in packages},
        "pip_check": check.strip().splitlines(),
    }


def commands_of(python: Path, folder: Path, extra: str) -> list[list[str]]:
    """What the install page says, and a run of ten steps; of an extra, what it is for."""
    sys.path.insert(0, str(ROOT))
    from transformers import AutoTokenizer

    from tests.tiny_data import write_jsonl
    from tests.tiny_models import save

    model, data = save("llama", folder / "model"), write_jsonl(folder / "train.jsonl", 16, 0)
    tokens = AutoTokenizer.from_pretrained(model)
    tokens.eos_token = "<pad>"  # TRL ends texts with it
    tokens.save_pretrained(model)
    mezo = str(python.parent / "mezo")
    words = ["--prompt", "{text} It was", "--label-words", " terrible", " great"]
    train = [mezo, "train", "--model", model, *words, "--train-file", data, "--dev-file", data, "--batch-size", "4"]
    train += ["--steps", "10", "--output-dir"]
    place = "import mezo, mezo_kernels, sys; assert mezo.__file__.startswith(sys.prefix), mezo.__file__"
    of_extra = {
        "trainer": [[str(python), str(ROOT / "examples" / name), model] for name in ("trainer.py", "sft.py")],
        "quantization": [[*train, str(folder / name), "--quantization", name] for name in ("int8", "nf4")],
        "sglang": [[str(python), "-c", "import sglang"]],
    }
    return [
        [str(python), "-c", place],
        [mezo, "--version"],
        [mezo, "--help"],
        [mezo, "env"],
        [mezo, "verify"],
        [*train, str(folder / "run")],
        [mezo, "replay", str(folder / "run"), "--output-dir", str(folder / "replayed")],
        *of_extra.get(extra, []),
    ]


def run_commands(commands: list[list[str]], folder: Path) -> list[dict]:
    """Run commands from a folder that has no source; the first that fails ends it.

    Returns:
        Each command as a person would write it, and its seconds.
    """
    found = []
    for command in commands:
        shown = " ".join(command).replace(f"{folder}/environment/bin/", "").replace(f"{folder}/", "")
        print("$", shown.replace(f"{ROOT}/", ""), flush=True)
        began = time.perf_counter()
        run = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        found.append({"command": shown.replace(f"{ROOT}/", ""), "seconds": round(time.perf_counter() - began, 1)})
        print(run.stdout.strip().splitlines()[-1] if run.stdout.strip() else "ok", flush=True)
    return found


def main() -> None:
    """Build, then check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    parser.add_argument("--whole", nargs="*", choices=EXTRAS, help="install the libraries from the index too")
    parser.add_argument("--results", type=Path, help="JSON of what --whole found, to which it adds")
    options = parser.parse_args()
    wheel, sdist = build(options.output)
    check_content(wheel)
    if options.whole is None:
        with tempfile.TemporaryDirectory() as name:
            python = install(wheel, Path(name) / "environment")
            run_commands(commands_of(python, Path(name), "base"), Path(name))
    for extra in (options.whole or EXTRAS) if options.whole is not None else ():
        with tempfile.TemporaryDirectory() as name:
            python, found = install_whole(wheel, Path(name) / "environment", extra)
            found["commands"] = run_commands(commands_of(python, Path(name), extra), Path(name))
        if options.results:
            known = json.loads(options.results.read_text()) if options.results.is_file() else {}
            known = {**known, "machine": describe(), extra: found}
            options.results.write_text(json.dumps(known, indent=1) + "\n")
    print(f"{wheel} and {sdist} are good")


if __name__ == "__main__":
    main()
