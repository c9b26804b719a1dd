"""The runtime in this process: transformers and PEFT."""
