"""What is known of transformers models: their families, how one is loaded, and what of it is trained."""

import logging

for library in ("torchao", "bitsandbytes", "torch.utils._pytree"):
    # transformers and PEFT import these where they are installed, and they say which GPU kernels a machine is without
    logging.getLogger(library).setLevel(logging.ERROR)
