"""Data sets of the Hugging Face hub as rows, under this package's names of the splits."""

from collections.abc import Callable, Iterable

from mezo.data.task import Row, as_stored
from mezo.errors import UserError


def from_hub(path: str, name: str = "", test: str = "validation") -> Callable[[], dict[str, Iterable[Row]]]:
    """A function that loads a data set's labelled splits from the hub, or from its local cache.

    Args:
        path: of the data set, e.g. "nyu-mll/glue".
        name: its configuration, e.g. "mnli"; "": it has one.
        test: the split to test on: validation where the official test set has no labels.

    Returns:
        A function for `Task.load`. It raises UserError if the data set cannot be loaded.
    """

    def load() -> dict[str, Iterable[Row]]:
        import datasets  # a second of imports that local files do not need

        try:
            hub = datasets.load_dataset(path, *([name] if name else []))
            return {"train": hub["train"].to_list(), "test": hub[test].to_list()}
        except Exception as error:  # no network, not found, renamed, damaged: the remedy is the same
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{path} {name}".strip() + f" cannot be loaded from the hub ({reason}): give local files of its fields"
                " beside --task, --train-file train.jsonl --test-file test.jsonl"
            ) from error

    return load


def labelled(row: Callable[[Row], Row] = as_stored) -> Callable[[Row], Row | None]:
    """`row` for rows with a label, None for those with -1, which is how the hub marks a missing one.

    >>> labelled()({"text": "Fun.", "label": 1}), labelled()({"text": "Fun.", "label": -1})
    ({'text': 'Fun.', 'label': 1}, None)
    """
    return lambda stored: None if stored["label"] == -1 else row(stored)
