"""What a run reads: its examples and the prompt around them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from mezo.config.options import PATH
from mezo.errors import require
from mezo.ranges import AtLeastOne, NotNegative


@dataclass(frozen=True)
class Data:
    """Data: the examples, how many of them, and the prompt around each."""

    task: str = ""
    """One of the tasks that `mezo tasks` lists; leave it out to train on --train-file alone."""
    train_file: Annotated[str, PATH] = ""
    """Training examples, one JSON object a line: with text and label (an index into --label-words), or with prompt,
    options and answer. Beside --task the lines have the fields of the task's data set, and files take its place."""
    dev_file: Annotated[str, PATH] = ""
    """Examples that choose the best step (the dev set); without them the last step is kept."""
    test_file: Annotated[str, PATH] = ""
    """Examples that are scored before and after training."""
    prompt: str = ""
    """Text around the fields of an example, such as '{text} It was'; by default the task's own."""
    label_words: tuple[str, ...] = ()
    """The word that stands for each class, in the order of the labels, with its leading space: ' terrible' ' great'; by
    default the task's own."""
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

    def refuse_missing_files(self) -> None:
        """Raise UserError for a data file that is not there."""
        for split in ("train", "dev", "test"):
            path = getattr(self, f"{split}_file")
            require(not path or Path(path).is_file(), f"--{split}-file: no such file: {path}")
