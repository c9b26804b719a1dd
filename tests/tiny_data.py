"""A tiny sentiment data set on disk, and options as a command line."""

import json
import random

GOOD, BAD = ("good", "fine", "great", "nice"), ("bad", "awful", "poor", "terrible")


def write_jsonl(path, n, seed):
    """n rows of text and label; the label is whether the words are good ones."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        words = ["the", rng.choice(("film", "story", "plot", "acting")), "was", rng.choice((BAD, GOOD)[i % 2])]
        rows.append({"text": " ".join(words[rng.randint(0, 3) :]), "label": i % 2})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def flags_of(options):
    """Options as a command line."""
    argv = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        argv.append(f"--no-{flag}" if value is False else f"--{flag}")
        if isinstance(value, bool):
            continue
        argv += [str(v) for v in value] if isinstance(value, (tuple, list)) else [str(value)]
    return argv
