"""A task of your own is one dataclass. Run this file as you would run `mezo`, and --task knows it:

python examples/own_task.py tasks
python examples/own_task.py train --model PATH_OR_HUB_ID --task weather --output-dir runs/weather
python examples/own_task.py train --resume runs/weather
"""

import sys

from mezo.cli.main import main
from mezo.tasks import Prompt, Task, register

REPORTS = {"Sun all day": 1, "Rain and wind": 0, "Clear and warm": 1, "Storms at sea": 0, "Blue skies": 1, "Fog": 0}


def load():
    """Rows by split, as they are stored: any mapping will do. Read your files or your database here."""
    towns = ("Oslo", "Rome")
    rows = [{"report": f"{text} in {town}.", "good": good} for town in towns for text, good in REPORTS.items()]
    return {"train": rows[:8], "dev": rows[8:10], "test": rows[10:]}


def row(stored):
    """The fields of the template and the label, an index into the label words; None would leave the row out."""
    return {"report": stored["report"], "label": stored["good"]}


WORDS = (" terrible", " great")  # one per class, with the space that comes before the word
WEATHER = Task(
    "weather",
    load,
    prompt=Prompt("{report} The weather is", WORDS, text_field="report"),  # for models that continue text
    masked=Prompt("{report} The weather is<mask>.", WORDS, text_field="report"),  # for those that fill a mask
    row=row,
)
# A row may bring its own options instead: no label words, and `row` returns "options" and "answer".

if __name__ == "__main__":
    register(WEATHER)
    sys.exit(main())
