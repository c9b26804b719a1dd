"""The report as a web page: whole, self-contained, and shown by a real browser that is offline."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mezo.api import train
from mezo.cli.main import main
from mezo.config import Config
from mezo.errors import UserError
from mezo.report import figures, page, tables
from mezo.run import logbook

VOID = {"meta", "link", "br", "hr", "img", "input"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model, tiny_data):
    """Two finished runs: one with every instrument and a prompt that is HTML, one plain."""
    directory = tmp_path_factory.mktemp("runs")
    config = Config.of(
        model=tiny_model, **tiny_data, output_dir=str(directory / "full"), prompt="<b>{text}</b> & It was",
        label_words=(" terrible", " great"), target_modules=("q_proj", "o_proj"), layers_to_transform=(2,), steps=40,
        batch_size=8, lr=1e-2, eval_every=10, num_perturbations=2, true_gradient=True, eval_train=True,
    )  # fmt: skip
    plain = {"output_dir": str(directory / "plain"), "num_perturbations": 1, "true_gradient": False, "noise": False}
    for each in (config, config.replace(dev_file="", **plain)):
        train(each)
    return directory / "full", directory / "plain"


class Reader(HTMLParser):
    """Elements, attributes and text of a page and the figures in it; refuses elements that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.attributes, self.text, self.figures = [], [], [], "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag == "img":
            start, data = dict(attrs)["src"].split(",")
            assert start == "data:image/svg+xml;base64"
            self.figures.append(Reader(base64.b64decode(data).decode()))
            self.text += self.figures[-1].text
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_page_refers_to_nothing_outside_itself(runs):
    text = page.html([str(run) for run in runs])
    reader = Reader(text)
    assert "://" not in text
    assert len(reader.figures) == 5
    assert all(reference.startswith("data:image/svg+xml") for reference in references(reader))
    for document in (reader, *reader.figures):
        assert not {"script", "link", "iframe", "object", "image"} & set(document.seen)
    for figure in reader.figures:
        ids = [value for name, value in figure.attributes if name == "id"]
        assert {reference.removeprefix("#") for reference in references(figure)} <= set(ids)
        assert set(re.findall(r"url\(([^)]*)\)", str(figure.attributes))) <= {f"#{name}" for name in ids}


def references(reader):
    """What a document's attributes refer to; namespaces are names, not addresses."""
    return [v for name, v in reader.attributes if name.split(":")[-1] in ("href", "src", "srcset", "data", "poster")]


def test_pictures_are_the_figures_of_the_page(runs, tmp_path, capsys):
    full, plain = map(str, runs)
    assert main(["report", full, plain, "--png", str(tmp_path / "new" / "png")]) == 0
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "new" / "png").iterdir()}
    assert set(pictures) == {
        f"{name}.png" for name in ("loss", "dev_accuracy", "projected_grad", "cosine", "step_parts")
    }
    assert all(data.startswith(b"\x89PNG") for data in pictures.values())
    assert capsys.readouterr().out.count("picture: ") == 5
    (tmp_path / "file").touch()
    assert "--png" in refused(["report", full, "--png", str(tmp_path / "file")], capsys)


def test_a_page_that_cannot_be_written_fails_no_run(tiny_config, monkeypatch, capsys):
    def fail(self, form):
        raise RuntimeError("no fonts\nat all")

    monkeypatch.setattr(figures.Drawing, "render", fail)
    result = train(tiny_config.replace(report=True))
    assert result["steps"] == tiny_config.method.steps
    assert json.loads((Path(tiny_config.machine.output_dir) / "result.json").read_text()) == result
    said = " ".join(capsys.readouterr().err.split())
    assert "report.html is not written (no fonts at all); try again: mezo report" in said


def test_a_run_of_an_older_version_with_plots_is_read_and_truncated(runs, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(runs[0], old)
    (old / "plots").mkdir()
    (old / "plots" / "training_loss.png").touch()
    assert "loss: training" in page.html([str(old)])
    aside = logbook.truncate(str(old), 20)
    assert (aside / "plots" / "training_loss.png").exists()
    assert (aside / "report.html").exists()
    assert not (old / "plots").exists()
    assert not (old / "report.html").exists()


def test_a_page_says_what_the_tables_say(runs):
    full, plain = map(str, runs)
    text = " ".join(Reader(page.html([full])).text.split())
    for rows in tables.tables(full).values():
        assert all(cell in text for row in rows for cell in row)
    assert "<b>{text}</b> & It was" in text
    assert all(
        label in text for label in ("standard error over the batch", "spread over perturbations", "true gradient")
    )
    other = " ".join(Reader(page.html([plain])).text.split())
    assert not any(label in other for label in ("dev accuracy", "standard error over the batch", "true gradient"))


def test_the_same_run_gives_the_same_page(runs):
    assert page.html([str(runs[0])]) == page.html([str(runs[0])])


def test_command(runs, tmp_path, capsys):
    full, plain = map(str, runs)
    assert (runs[0] / "report.html").read_text() == page.html([full]), "the run's own"
    assert main(["report", full]) == 0
    assert "page:" in capsys.readouterr().out
    assert (runs[0] / "report.html").read_text() == page.html([full])
    assert main(["report", full]) == 0
    written = (runs[1] / "report.html").stat().st_mtime_ns
    assert main(["report", full, plain]) == 0
    printed = capsys.readouterr().out
    assert "options that differ" in printed
    assert "num_perturbations" in printed
    assert (runs[1] / "report.html").stat().st_mtime_ns == written, "several runs have no page but that of --html"
    both = tmp_path / "both.html"
    assert main(["report", full, plain, "--html", str(both)]) == 0
    text = Reader(both.read_text()).text
    assert "full, dev" in text
    assert "options that differ" in text
    assert "no result.json there" in refused(["report", str(tmp_path)], capsys)
    assert "give at least one run directory" in refused(["report"], capsys)
    assert "a run is given twice" in refused(["report", full, full, "--html", str(both)], capsys)
    (tmp_path / "mine.html").write_text("precious")
    assert "exists and is no report" in refused(["report", full, "--html", str(tmp_path / "mine.html")], capsys)
    assert (tmp_path / "mine.html").read_text() == "precious"
    nowhere = str(tmp_path / "gone" / "page.html")
    assert "cannot be written (No such file or directory)" in refused(["report", full, "--html", nowhere], capsys)


def test_several_runs_are_a_row_each_with_what_differs(runs):
    paths = list(map(str, runs))
    head, full, plain = tables.comparison(paths, ["full", "plain"])
    result = json.loads((runs[0] / "result.json").read_text())
    row = dict(zip(head, full, strict=True))
    assert row["test after"] == f"{result['test']['after']['accuracy']:.4f}"
    assert row["at step"] == str(result["best_step"])
    best = next(each for each in result["dev"] if each["step"] == result["best_step"])
    assert row["best dev"] == f"{best['accuracy']:.4f}"
    assert dict(zip(head, plain, strict=True))["best dev"] == "-", "it has no dev set"
    differ = tables.differences(paths, ["full", "plain"])
    assert ("num_perturbations", "2", "1") in differ
    assert not {"lr", "output_dir"} & {name for name, *_ in differ}


def refused(argv, capsys):
    assert main(argv) == 2
    return capsys.readouterr().err


def test_names_tell_runs_apart(tmp_path):
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert page.names_of([str(path) for path in paths]) == ["a/run", "b/run"]
    assert page.names_of(["x/run"]) == ["run"]
    with pytest.raises(UserError, match="a run is given twice"):
        page.names_of(["x", "./x"])


def test_a_long_run_is_drawn_with_as_many_points_as_a_page_can_bear(runs):
    at, mean, least, greatest = figures.binned(np.arange(100_000), np.ones(100_000))
    assert len(at) == len(mean) == len(least) == len(greatest) == figures.POINTS


def test_warnings(runs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs[0], copy)
    result = json.loads((copy / "result.json").read_text()) | {"best_step": 10}
    (copy / "result.json").write_text(json.dumps(result))
    assert tables.warnings(str(copy)) == []
    result |= {
        "projected_grad_noise": 1.0, "projected_grad_rms": 2.0, "perturbation_error": 0.7, "perturbation_cosine": 0.7,
        "zero_gradient_share": 0.5, "clipped_share": 0.9, "skipped_steps": 3, "best_step": 0,
    }  # fmt: skip
    (copy / "result.json").write_text(json.dumps(result))
    found = tables.warnings(str(copy))
    starts = ("noise of 1 on", "rounding to the base's dtype", "50 % of projected_grads are zero", "90 % of", "3 steps",
              "no evaluation of dev was better")  # fmt: skip
    assert [text.startswith(start) for text, start in zip(found, starts, strict=True)] == [True] * 6
    assert all(text in Reader(page.html([str(copy)])).text for text in found)


@pytest.mark.skipif(
    not any(map(shutil.which, BROWSERS)), reason="no Chromium here: the page is not opened in a browser"
)
def test_a_browser_shows_the_page_and_asks_for_nothing(runs, tmp_path):
    """Offline, every figure is drawn; what the browser asks for on its own account is told apart by its initiator."""
    path, control = tmp_path / "page.html", tmp_path / "control.html"
    page.write([str(run) for run in runs], path)
    control.write_text(path.read_text().replace("</body>", '<img src="http://example.invalid/x.png"></body>'))
    assert opened(control, tmp_path) == {"http://example.invalid/x.png"}
    assert opened(path, tmp_path) == set()
    assert (tmp_path / "page.png").stat().st_size > 50_000


def opened(path, directory):
    """Addresses outside the page that it asks for when a browser shows it; a picture of it is kept."""
    browser, log = next(filter(None, map(shutil.which, BROWSERS))), directory / "net.json"
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", "--disable-component-update"]
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={directory / 'profile'}"]
    wanted = [f"--log-net-log={log}", f"--screenshot={path.with_suffix('.png')}", "--window-size=900,2400"]
    command = [browser, *quiet, *offline, *wanted, path.as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    requests = [
        event["params"] for event in json.loads(log.read_text())["events"] if "initiator" in event.get("params", {})
    ]
    return {request["url"] for request in requests if request["initiator"] != "not an origin"}
