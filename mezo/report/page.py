"""A report as one HTML page that opens anywhere: figures inside it, nothing fetched, no script."""

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from mezo.config import Config
from mezo.errors import UserError
from mezo.report import tables
from mezo.report.figures import Curves, Drawing, drawings
from mezo.run.directory import RunDirectory
from mezo.run.files import replace_file
from mezo.run.trajectory import read_trajectory

MARK = '<meta name="generator" content="mezo report">'
HEAD = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{MARK}
<meta name="viewport" content="width=device-width, initial-scale=1">
"""
CSS = """<style>
:root { color-scheme: light dark; --text: #222; --page: #fff; --line: #ddd; --warning: #fff4d6; }
@media (prefers-color-scheme: dark) { :root { --text: #ddd; --page: #16181c; --line: #3a3d44; --warning: #3d3112; } }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 1.5rem auto; padding: 0 1rem; }
body { color: var(--text); background: var(--page); }
h1 { overflow-wrap: break-word; font-size: 1.3rem; margin: 1.6rem 0 0; opacity: .8; }
.headline { font-size: 1.7rem; line-height: 1.25; margin: .3rem 0; } .beside { opacity: .75; margin: .2rem 0 1rem; }
.verdict { padding-left: 1.2rem; } code { white-space: nowrap; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .3rem 0 1.2rem; }
caption { text-align: left; font-weight: 600; padding: .2rem 0; }
td, th { border-bottom: 1px solid var(--line); padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top; }
th { font-weight: 400; opacity: .75; }
td { overflow-wrap: break-word; font-variant-numeric: tabular-nums; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 1.5rem; }
figure { margin: .8rem 0; } figcaption { font-weight: 600; padding-bottom: .3rem; }
figure img { width: 100%; height: auto; }
@media (prefers-color-scheme: dark) { figure img { filter: invert(1) hue-rotate(180deg); } }
.number { text-align: right; } summary { cursor: pointer; padding: .3rem 0; }
.warnings { background: var(--warning); padding: .6rem 2rem; border-left: 4px solid #d99a00; }
.given { font-weight: 600; }
</style>
"""


NUMBER = re.compile(r"-|[-+.,0-9]+(e[-+][0-9]+)?( ?%| s)?")


def write(runs: Sequence[str], path: Path) -> None:
    """Write the page of one run, or of several beside each other.

    Args:
        runs: directories of finished runs.
        path: of the page; an older page there is replaced, any other file is not.
    Raises:
        UserError: a run is none or is not finished, or the page cannot be written.
    """
    text = html(runs)
    try:
        if path.exists() and MARK not in path.read_text(errors="replace")[:500]:
            raise UserError(f"{path} exists and is no report: choose another file with --html")
        replace_file(path, text.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another file with --html") from error


def write_pictures(runs: Sequence[str], directory: Path) -> list[Path]:
    """Write the page's figures as PNG files.

    Args:
        runs: directories of finished runs, drawn beside each other.
        directory: of the files, made if missing; those of the same names there are replaced.
    Returns:
        The files.
    Raises:
        UserError: a run is none or is not finished, or the files cannot be written.
    """
    pictures = {directory / f"{drawn.name}.png": drawn.render("png") for drawn in drawings(_curves(runs))}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path, data in pictures.items():
            replace_file(path, data)
    except OSError as error:
        raise UserError(f"--png {directory} cannot be written ({error.strerror}): choose another directory") from error
    return list(pictures)


def html(runs: Sequence[str]) -> str:
    """The page's text: the same files give the same bytes."""
    names = names_of(runs)
    parts = [HEAD, f"<title>{escape(', '.join(names))}: mezo report</title>\n", CSS, "</head>\n<body>\n"]
    parts += [_table(title, rows, head) for title, (head, *rows) in beside(runs, names).items()]
    figures = f'<div class="figures">\n{"".join(map(_figure, drawings(_curves(runs))))}</div>\n'
    parts += [figures] if len(runs) > 1 else []
    for name, run in zip(names, runs, strict=True):
        learnt, work = _run(run)
        parts += [f"<h1>{escape(name)}</h1>\n", learnt, *([figures] if len(runs) == 1 else []), work]
    configs = [RunDirectory(Path(run)).read_config() for run in runs]
    return "".join([*parts, _options(names, configs), "</body>\n</html>\n"])


def _run(run: str) -> tuple[str, str]:
    """What a run learnt, with what to do next and single examples; and what it took, which is folded."""
    first, *others = [*tables.headline(run), ""]
    parts = [f'<p class="headline">{escape(first)}</p>\n'] if first else []
    parts += [f'<p class="beside">{escape(text)}</p>\n' for text in others if text]
    shown = tables.tables(run)
    for kind, texts in (("verdict", [text for (text,) in shown.pop("verdict")]), ("warnings", tables.warnings(run))):
        items = "".join(f"<li>{_with_flags(text)}</li>\n" for text in texts)
        parts += [f'<ul class="{kind}">\n{items}</ul>\n'] if items else []
    made = {title: _table(title, *reversed(tables.headed(title, rows))) for title, rows in shown.items()}
    work = "".join(made.pop(title) for title in tables.WORK if title in made)
    folded = (
        f"<details>\n<summary>what it took: time, tokens, and what an estimate is worth</summary>\n{work}</details>\n"
    )
    return "".join([*parts, *made.values()]), folded


def _with_flags(text: str) -> str:
    """A sentence whose flags are not broken at their dashes."""
    return re.sub(r"--[a-z][a-z-]*[a-z]", r"<code>\g<0></code>", escape(text))


def _figure(drawn: Drawing) -> str:
    text, image = escape(drawn.caption), base64.b64encode(drawn.render("svg")).decode()
    return (
        f"<figure>\n<figcaption>{text}</figcaption>\n"
        f'<img alt="{text}" src="data:image/svg+xml;base64,{image}">\n</figure>\n'
    )


def beside(runs: Sequence[str], names: Sequence[str]) -> dict[str, list[tuple[str, ...]]]:
    """What sets several runs apart, by the title of its table, head first; nothing of a single run.

    Args:
        runs: directories of finished runs.
        names: what to call them.
    """
    if len(runs) < 2:
        return {}
    found = {"runs": tables.comparison(runs, names), "options that differ": tables.differences(runs, names)}
    return {title: rows for title, rows in found.items() if len(rows) > 1}


def _curves(runs: Sequence[str]) -> list[Curves]:
    """What is drawn of each run, under the name that tells it apart."""
    directories = [tables.finished(run) for run in runs]
    return [
        Curves(name, read_trajectory(run.trajectory)[1], run.read_metrics(), run.read_result())
        for name, run in zip(names_of(runs), directories, strict=True)
    ]


def names_of(runs: Sequence[str]) -> list[str]:
    """Last parts of the paths, as many as tell the runs apart.

    Args:
        runs: directories.
    Raises:
        UserError: one is given twice.
    """
    parts = [Path(run).resolve().parts for run in runs]
    if len(set(parts)) != len(parts):
        raise UserError(f"mezo report: a run is given twice among {', '.join(runs)}: drop one")
    depths = range(1, max(map(len, parts)) + 1)
    enough = next(n for n in depths if len({part[-n:] for part in parts}) == len(parts))
    return ["/".join(part[-enough:]) for part in parts]


def _table(title: str, rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    if not rows:
        return ""
    kinds = [' class="number"' if all(NUMBER.fullmatch(cell) for cell in cells) else "" for cells in zip(*rows)]  # noqa: B905
    titles = "".join(f"<th{kind}>{escape(cell)}</th>" for cell, kind in zip(head, kinds, strict=True)) if head else ""
    lines = f"<tr>{titles}</tr>\n" if head else ""
    for row in rows:
        lines += "<tr>" + "".join(f"<td{k}>{escape(cell)}</td>" for cell, k in zip(row, kinds, strict=True)) + "</tr>\n"
    return f'<div class="wide"><table>\n<caption>{escape(title)}</caption>\n{lines}</table></div>\n'


def _options(names: Sequence[str], configs: Sequence[Config]) -> str:
    """Every option, a column for each run; those that differ from the default in bold."""
    lines = []
    flat = [config.to_dict() for config in configs]
    for option in Config.options().values():
        if not any(option.name in options for options in flat):
            continue
        values = [options.get(option.name, option.default) for options in flat]
        cells = (
            f'<td class="given">{escape(_shown(v))}</td>' if v != option.default else f"<td>{escape(_shown(v))}</td>"
            for v in values
        )
        lines.append(f"<tr><td>{option.name}</td>{''.join(cells)}</tr>\n")
    head = "".join(f"<th>{escape(name)}</th>" for name in names) if len(names) > 1 else ""
    head = f"<tr><th></th>{head}</tr>\n" if head else ""
    table = f'<div class="wide"><table>\n{head}{"".join(lines)}</table></div>\n'
    return f"<details>\n<summary>configuration</summary>\n{table}</details>\n"


def _shown(value: object) -> str:
    return " ".join(map(repr, value)) if isinstance(value, tuple) else str(value)
