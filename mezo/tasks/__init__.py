"""Tasks: what a run is trained and tested on. `load_splits` turns a configuration into tokenised examples."""

from transformers import PreTrainedTokenizerBase

from mezo.config import Config, Data, Method
from mezo.data.example import Example
from mezo.data.files import forget
from mezo.data.load import examples_of
from mezo.data.own import own_task, with_files
from mezo.data.task import Prompt, Task
from mezo.errors import UserError
from mezo.tasks.boolq import BOOLQ
from mezo.tasks.cb import CB
from mezo.tasks.copa import COPA
from mezo.tasks.cr import CR
from mezo.tasks.drop import DROP
from mezo.tasks.mnli import MNLI
from mezo.tasks.mpqa import MPQA
from mezo.tasks.mr import MR
from mezo.tasks.multirc import MULTIRC
from mezo.tasks.record import RECORD
from mezo.tasks.rte import RTE
from mezo.tasks.snli import SNLI
from mezo.tasks.squad import SQUAD
from mezo.tasks.sst2 import SST2
from mezo.tasks.sst5 import SST5
from mezo.tasks.subj import SUBJ
from mezo.tasks.trec import TREC
from mezo.tasks.wic import WIC
from mezo.tasks.wsc import WSC

__all__ = ["TASKS", "Prompt", "Task", "find_task", "load_splits", "register", "with_objective"]

SENTENCES = (SST2, SST5, MR, CR, MPQA, SUBJ, TREC, SNLI, MNLI, RTE)
QUESTIONS = (CB, BOOLQ, WSC, WIC, MULTIRC, COPA, RECORD, SQUAD, DROP)
TASKS: dict[str, Task] = {task.name: task for task in SENTENCES + QUESTIONS}
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


def find_task(data: Data, method: Method | None = None, by_number: bool = False) -> Task:
    """The task that is named, or the one behind the files; with both, the task on the files' rows.

    Args:
        data: names the task or the files.
        method: of the run; files may lack right answers where it needs none.
        by_number: labels of files that are numbers need no words: a head for classes scores them.
    Raises:
        UserError: no task has that name.
    """
    if not data.task:
        return own_task(data, method, by_number)
    if data.task not in TASKS:
        raise UserError(f"--task {data.task!r} is unknown: choose from {', '.join(TASKS)} or give --train-file")
    return with_files(TASKS[data.task], data)


def with_objective(config: Config) -> Config:
    """The configuration with what is trained and how it is judged settled: "auto" is the task's own."""
    if "auto" not in (config.method.objective, config.method.generate):
        return config
    task = find_task(config.data, config.method, config.model.tuning.head != "model")
    objective = task.objective if config.method.objective == "auto" else config.method.objective
    generate = config.method.generate if config.method.generate != "auto" else "on" if task.generate else "off"
    return config.replace(objective=objective, generate=generate)


def load_splits(
    config: Config, tokenizer: PreTrainedTokenizerBase, masked: bool | None = None
) -> dict[str, list[Example]]:
    """The tokenised examples of a run by split, as `mezo.data.load.examples_of` makes them of its task.

    Args:
        config: names the task or files, the prompt, the options, how many examples and the token budget.
        tokenizer: the model's.
        masked: whether the model fills masks; None: it does if its tokenizer has a mask token.

    Raises:
        UserError: bad data or a configuration that does not fit it; nothing has been written.
    """
    method, pooled = with_objective(config).method, config.model.tuning.head != "model"
    try:
        return examples_of(find_task(config.data, method, pooled), config.data, method, tokenizer, masked, pooled)
    finally:
        forget()
