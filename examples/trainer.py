"""MeZO in the Trainer of transformers: one name changes, and eps is given.

python examples/trainer.py PATH_OR_HUB_ID
"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, TrainingArguments

from mezo import MeZOTrainer

TEXTS = [f"the {thing} was {word}" for thing in ("film", "story", "plot") for word in ("good", "great", "fine")]


def main(path: str, steps: int = 200, output_dir: str = "runs/trainer") -> MeZOTrainer:
    """Train every weight on a few sentences."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = Dataset.from_dict(dict(tokenizer(TEXTS)))
    args = TrainingArguments(output_dir, max_steps=steps, learning_rate=1e-5, logging_steps=10, report_to="none")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = MeZOTrainer(model, args, collator, train_dataset=data, mezo_options={"eps": 1e-3})
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1])
