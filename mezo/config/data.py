"""What a run reads: its examples and the prompt around them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from mezo.config.options import PATH
from mezo.errors import require
from mezo.ranges import AtLeastOne, NotNegative

HUB, MEMORY = "hub:", "memory:"
"""Begin what names a data set of the hub, and rows that were given from Python."""
ELSEWHERE = (HUB, MEMORY)


@dataclass(frozen=True)
class Data:
    """Data: the examples, how many of them, and the prompt around each."""

    task: str = ""
    """One of the tasks that `mezo tasks` lists; leave it out to train on --train-file alone."""
    train_file: Annotated[str, PATH] = ""
    """Training examples: a file of JSON lines, a JSON list, CSV, TSV, Parquet or Arrow, a folder that `datasets` can
    load, or hub:OWNER/NAME[:CONFIG][:SPLIT]. Its rows are a text with a label, prompt with options and answer, or what
    TRL takes: text alone, messages, prompt and completion, chosen and rejected. Beside --task the rows have the fields
    of the task's data set, and files take its place."""
    dev_file: Annotated[str, PATH] = ""
    """Examples that choose the best step (the dev set); without them the last step is kept."""
    test_file: Annotated[str, PATH] = ""
    """Examples that are scored before and after training."""
    text_column: tuple[str, ...] = ()
    """Column that {text} in --prompt stands for; two of them are a pair, {text} and {text_pair}. By default one of the
    usual names (text, sentence, review, ...), which the run says."""
    label_column: str = ""
    """Column with the labels: numbers from 0, words, classes of `datasets`, or true and false. By default one of the
    usual names (label, labels, class, ...), which the run says."""
    prompt: str = ""
    """Text around the fields of an example, such as '{text} It was'; by default the task's own."""
    label_words: tuple[str, ...] = ()
    """The word that stands for each class, in the order of the labels, with its leading space: ' terrible' ' great'; by
    default the task's own. Labels that are names are matched with these words, or else go by order; names without
    --label-words stand for themselves."""
    chat_template: Annotated[str, PATH] = ""
    """Jinja template for data of messages, as a file or as text; by default the tokenizer's own."""
    k_shot: NotNegative = 0
    """Training examples of each class, and as many dev examples; 0 takes all."""
    num_train: NotNegative = 0
    """Training examples in all; 0 takes all."""
    num_dev: NotNegative = 0
    """Dev examples in all; 0 takes all."""
    num_test: NotNegative = 0
    """Test examples in all; 0 takes all."""
    balance: Literal["on", "off"] = "on"
    """on: --num-train, --num-dev and --num-test keep equally many of each class as far as there are, and --k-shot
    refuses a class with fewer. off: random samples, and all of a class with fewer, as in the MeZO paper."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used, such as one without a label; the log's header says how many of each split."""
    data_seed: NotNegative = 0
    """Seed that decides which examples are kept, and which are shown as demonstrations."""
    num_demonstrations: NotNegative = 0
    """For `mezo eval`: so many training examples with their answers stand in front of each prompt (in-context
    learning), classes balanced; those that do not fit into --max-length are left out."""
    max_length: AtLeastOne = 512
    """Most tokens of a prompt with its longest option; a longer text is cut, the words around it and the options
    never."""
    truncation: Literal["right", "left", "refuse"] = "right"
    """Which end of a text that is too long for --max-length is cut: the right one, the left one, or none, and such a
    row is refused. A prompt that is followed by options or a completion of its own is cut at the left or not at all."""

    def refuse_missing_files(self) -> None:
        """Raise UserError for a data file that is not there."""
        for split in ("train", "dev", "test"):
            path = getattr(self, f"{split}_file")
            there = path.startswith(ELSEWHERE) or Path(path).exists()
            require(not path or there, f"--{split}-file: no such file: {path}")
