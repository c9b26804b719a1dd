"""Tasks: what a run is trained and tested on. `load_splits` turns a configuration into tokenised examples."""

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from mezo.config import Config, UserError
from mezo.runtimes.base import Example
from mezo.tasks.base import Prompt, Record, Task
from mezo.tasks.boolq import BOOLQ
from mezo.tasks.cb import CB
from mezo.tasks.copa import COPA
from mezo.tasks.cr import CR
from mezo.tasks.demonstrations import draw_demonstrations, put_before
from mezo.tasks.drop import DROP
from mezo.tasks.jsonl import jsonl_task, with_files
from mezo.tasks.mnli import MNLI
from mezo.tasks.mpqa import MPQA
from mezo.tasks.mr import MR
from mezo.tasks.multirc import MULTIRC
from mezo.tasks.record import RECORD
from mezo.tasks.records import records_of
from mezo.tasks.rte import RTE
from mezo.tasks.sampling import sample
from mezo.tasks.snli import SNLI
from mezo.tasks.squad import SQUAD
from mezo.tasks.sst2 import SST2
from mezo.tasks.sst5 import SST5
from mezo.tasks.subj import SUBJ
from mezo.tasks.template import Template
from mezo.tasks.tokenization import encode
from mezo.tasks.trec import TREC
from mezo.tasks.wic import WIC
from mezo.tasks.wsc import WSC

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


def load_splits(
    config: Config, tokenizer: PreTrainedTokenizerBase, masked: bool | None = None
) -> dict[str, list[Example]]:
    """The tokenised examples of a run: a pure function of the configuration, the data and the tokenizer.

    Args:
        config: names the task or files, the prompt, the options, how many examples and the token budget.
        tokenizer: the model's.
        masked: whether the model fills masks; None: it does if its tokenizer has a mask token.

    Returns:
        Examples by split: "train", and "dev" and "test" where there are any. Under lm_cross_entropy a training example
        has its right option alone, which is all that the loss reads, unless the run also scores train (eval_train).
        With num_demonstrations train is what these are drawn from, and is left out.

    Raises:
        UserError: bad data or a configuration that does not fit it; nothing has been written.
    """
    if masked is None:
        masked = tokenizer.mask_token is not None
    pooled = config.head == "linear"
    masked = masked and not pooled
    config, task = with_objective(config), find_task(config)
    prompt = _prompt(task, config, masked)
    template = Template.parse(prompt.template, prompt.text_field)
    min_options = 1 if config.objective == "lm_cross_entropy" else 2
    records = {
        split: records_of(task, split, rows, template.fields, prompt.label_words, min_options)
        for split, rows in task.load().items()
    }
    kept = sample(records, config, task.dev_size)
    if config.num_demonstrations:
        if "train" not in kept or len(kept) == 1:
            missing = "test" if "train" in kept else "train"
            raise UserError(f"--num-demonstrations needs train and what is tested: give --{missing}-file")
        drawn = draw_demonstrations(kept.pop("train"), config)
        kept = {
            split: put_before(own, drawn, template, tokenizer, config.max_length, masked) for split, own in kept.items()
        }
    if config.objective == "lm_cross_entropy" and "train" in kept and not config.eval_train:
        kept["train"] = [_right_alone(record) for record in kept["train"]]
    length = config.max_length
    return {split: encode(own, template, tokenizer, length, masked, pooled) for split, own in kept.items()}


def find_task(config: Config) -> Task:
    """The task that the configuration names, or the one behind its files; with both, the task on the files' rows.

    Raises:
        UserError: no task has that name.
    """
    if not config.task:
        return jsonl_task(config)
    if config.task not in TASKS:
        raise UserError(f"--task {config.task!r} is unknown: choose from {', '.join(TASKS)} or give --train-file")
    return with_files(TASKS[config.task], config)


def with_objective(config: Config) -> Config:
    """The configuration with its objective settled: "auto" is the task's own."""
    return replace(config, objective=find_task(config).objective) if config.objective == "auto" else config


def _prompt(task: Task, config: Config, masked: bool) -> Prompt:
    """The task's prompt for the kind of model at hand, as far as the configuration does not replace it."""
    own, other = (task.masked, task.prompt) if masked else (task.prompt, task.masked)
    if own is None and not config.prompt:
        what = "fills a mask" if masked else "continues text"
        raise UserError(f"task {task.name} has no prompt for a model that {what}: give --prompt")
    given = own or other or Prompt(config.prompt)
    words = config.label_words or given.label_words
    if given.label_words and len(words) != len(given.label_words):
        count = len(given.label_words)
        raise UserError(f"--label-words has {len(words)} words, task {task.name} has {count} classes")
    return Prompt(config.prompt or given.template, words, given.text_field)


def _right_alone(record: Record) -> Record:
    return replace(record, options=(record.options[record.label],), label=0)
