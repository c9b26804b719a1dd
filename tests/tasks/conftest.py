"""The tokenizers and data of the tests of data, for tests of tasks too."""

from tests.data.conftest import bpe, encoder, hub, make, roberta  # noqa: F401
