"""The runtime that scores with an SGLang engine: the side of the trainer."""
