"""SST-2: movie review sentences, negative or positive (Socher et al. 2013; GLUE)."""

from collections.abc import Iterable, Mapping
from typing import Any

from mezo.config import UserError
from mezo.tasks.base import Task

HUB_ID = "stanfordnlp/sst2"


def load() -> dict[str, list[dict[str, Any]]]:
    """Rows of SST-2 from the hub; test is its validation split, since the official test set has no labels.

    Raises:
        UserError: the hub cannot be reached and the data set is not in its local cache.
    """
    import datasets  # a second of imports that local files do not need

    try:
        hub = datasets.load_dataset(HUB_ID)
    except OSError as error:  # no network, hub offline, data set not found: all are OSErrors
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--task sst2 cannot be loaded from the hub ({reason}): use local files instead, --train-file train.jsonl"
            f" --prompt '{SST2.template.replace('sentence', 'text')}' --label-words ' terrible' ' great'"
        ) from None
    return splits(hub)


def splits(hub: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Map the hub's splits (rows of sentence, label, idx) to train and test.

    >>> rows = [{"idx": 0, "sentence": "a smart , sweet film ", "label": 1}]
    >>> splits({"train": rows, "validation": rows})["test"]
    [{'sentence': 'a smart , sweet film', 'label': 1}]
    """
    # Each sentence ends with a space, which would separate the template from it by two.
    return {
        split: [{"sentence": row["sentence"].strip(), "label": row["label"]} for row in hub[name]]
        for split, name in (("train", "train"), ("test", "validation"))
    }


SST2 = Task("sst2", load, "{sentence} It was", (" terrible", " great"), text_field="sentence")
