"""`make dist`: wheel and sdist, and what the install page says, run from the wheel in an environment of its own.

python bench/dist.py [--output dist] [--whole]

The environment is new and holds the wheel alone; libraries are those of the Python that runs this, since they are
gigabytes. With --whole pip installs them from the index instead, as a user's would, with the extras trainer and dev;
torch alone is of the version that `make` pins, so that a machine without a GPU gets the build that it has.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


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


def install(wheel: Path, place: Path, whole: bool) -> Path:
    """A new environment with the wheel; its Python."""
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet"]
    if whole:
        pinned = next(line for line in (ROOT / "requirements.txt").read_text().split() if line.startswith("torch=="))
        subprocess.run([*pip, pinned, f"{wheel}[trainer,dev]"], check=True)
        subprocess.run([python, "-c", "import trl, pytest, hypothesis"], check=True, capture_output=True)
        subprocess.run([python, "-m", "pip", "check"], check=True)
    else:
        subprocess.run([*pip, "--no-deps", str(wheel)], check=True)
        libraries = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, capture_output=True,
            text=True,
        ).stdout.strip()  # fmt: skip
        (Path(libraries) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def check_commands(python: Path, folder: Path) -> None:
    """Import, help, version, verify, and a run of ten steps, from a folder that has no source."""
    sys.path.insert(0, str(ROOT))
    from tests.tiny_data import write_jsonl
    from tests.tiny_models import save

    model, data = save("llama", folder / "model"), write_jsonl(folder / "train.jsonl", 16, 0)
    mezo = str(python.parent / "mezo")
    words = ["--prompt", "{text} It was", "--label-words", " terrible", " great"]
    files = ["--train-file", data, "--dev-file", data, "--output-dir", str(folder / "run")]
    place = "import mezo, mezo_kernels, sys; assert mezo.__file__.startswith(sys.prefix), mezo.__file__"
    commands = (
        [str(python), "-c", place],
        [mezo, "--version"],
        [mezo, "--help"],
        [mezo, "verify"],
        [mezo, "train", "--model", model, *words, *files, "--steps", "10", "--batch-size", "4"],
        [mezo, "replay", str(folder / "run"), "--output-dir", str(folder / "replayed")],
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for command in commands:
        print("$", " ".join(command), flush=True)
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        print(run.stdout.strip().splitlines()[-1] if run.stdout.strip() else "ok", flush=True)


def main() -> None:
    """Build, then check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    parser.add_argument("--whole", action="store_true", help="install the libraries from the index too")
    options = parser.parse_args()
    wheel, sdist = build(options.output)
    check_content(wheel)
    with tempfile.TemporaryDirectory() as folder:
        check_commands(install(wheel, Path(folder) / "environment", options.whole), Path(folder))
    print(f"{wheel} and {sdist} are good")


if __name__ == "__main__":
    main()
