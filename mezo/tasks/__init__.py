"""Tasks: what a run is trained and tested on. `load_splits` turns a configuration into tokenised examples."""

from transformers import PreTrainedTokenizerBase

from mezo.config import Config, UserError
from mezo.runtimes.base import Example
from mezo.tasks.base import Task, check_rows
from mezo.tasks.jsonl import jsonl_task
from mezo.tasks.sampling import sample
from mezo.tasks.sst2 import SST2
from mezo.tasks.template import Template
from mezo.tasks.tokenization import encode

TASKS: dict[str, Task] = {SST2.name: SST2}
"""Built-in and registered tasks by name."""


def register(task: Task) -> Task:
    """Make a task of your own known to `--task`.

    Raises:
        ValueError: the name is taken.
    """
    if task.name in TASKS:
        raise ValueError(f"a task named {task.name!r} exists: choose another name")
    TASKS[task.name] = task
    return task


def load_splits(
    config: Config, tokenizer: PreTrainedTokenizerBase, masked: bool | None = None
) -> dict[str, list[Example]]:
    """The tokenised examples of a run: a pure function of the configuration, the data and the tokenizer.

    Args:
        config: names the task or files, the prompt, the options, how many examples and the token budget.
        tokenizer: the model's.
        masked: whether the model fills masks; None: it does if its tokenizer has a mask token.

    Returns:
        Examples by split: "train", and "dev" and "test" where there are any.

    Raises:
        UserError: bad data or a configuration that does not fit it; nothing has been written.
    """
    task = find_task(config)
    words = config.label_words or task.label_words
    if task.label_words and len(words) != len(task.label_words):
        raise UserError(f"--label-words has {len(words)} words, task {task.name} has {len(task.label_words)} classes")
    template = Template.parse(config.prompt or task.template, task.text_field)
    min_options = 1 if config.objective == "lm_cross_entropy" else 2
    records = {
        split: check_rows(rows, task.sources.get(split, f"{task.name} {split}"), template.fields, words, min_options)
        for split, rows in task.load().items()
    }
    if masked is None:
        masked = tokenizer.mask_token is not None
    return {
        split: encode(kept, template, tokenizer, config.max_length, masked)
        for split, kept in sample(records, config, task.dev_size).items()
    }


def find_task(config: Config) -> Task:
    """The task that the configuration names, or the one behind its files.

    Raises:
        UserError: no task has that name.
    """
    if not config.task:
        return jsonl_task(config)
    if config.task not in TASKS:
        raise UserError(f"--task {config.task!r} is unknown: choose from {', '.join(TASKS)} or give --train-file")
    return TASKS[config.task]
