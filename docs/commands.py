"""A hook of mkdocs: the page of commands is what `mezo --help` and the help of every command print."""

import subprocess
import sys

from mezo.cli.main import COMMANDS

PLACE = "<!-- help of every command -->"


def help_of(*command: str) -> str:
    """What a command prints for --help, on a page of 100 columns."""
    run = [sys.executable, "-m", "mezo", *command, "--help"]
    return subprocess.run(run, capture_output=True, text=True, check=True, env={"COLUMNS": "100", "PATH": ""}).stdout


def on_page_markdown(markdown: str, **_) -> str:
    """The text of a page, with the help in place of the mark."""
    if PLACE not in markdown:
        return markdown
    parts = []
    for title, commands in COMMANDS.items():
        parts.append(f"## {title}")
        parts += [f"### mezo {name}\n\n{summary}.\n\n```text\n{help_of(name)}```" for name, summary in commands.items()]
    return markdown.replace(PLACE, "\n\n".join(parts))
