"""Import the ops once, before doctest collection imports each module by its path and registers them again."""

import mezo_kernels  # noqa: F401
