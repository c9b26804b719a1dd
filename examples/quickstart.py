"""Train, look, save and rebuild from Python, in a dozen lines.

python examples/quickstart.py PATH_OR_HUB_ID
"""

import sys

import mezo

GOOD, BAD = ("great", "good", "fine", "nice"), ("awful", "bad", "poor", "terrible")
ROWS = [
    {"review": f"the {thing} was {word}", "sentiment": "positive" if word in GOOD else "negative"}
    for thing in ("film", "story", "plot", "acting")
    for word in GOOD + BAD
]


def main(model: str, steps: int = 200, output_dir: str = "runs/quickstart") -> mezo.Run:
    """Train an adapter on two thirds of the reviews; any list of dicts, `datasets.Dataset` or file will do."""
    run = mezo.train(
        model=model,
        train=ROWS[: 2 * len(ROWS) // 3],
        test=ROWS[2 * len(ROWS) // 3 :],
        prompt="{text} It was",
        label_words=(" terrible", " great"),
        steps=steps,
        lr=1e-3,
        output_dir=output_dir,
    )
    print("accuracy", run.result["test"]["before"]["accuracy"], "->", run.result["test"]["after"]["accuracy"])
    print("trained", sum(tensor.numel() for tensor in run.theta.values()), "numbers; page:", run.report())
    run.replay(run.path / "replayed")  # the log alone rebuilds the adapter, bit for bit
    return run


if __name__ == "__main__":
    main(sys.argv[1])
