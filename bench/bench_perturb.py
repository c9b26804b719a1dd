"""perturb_, one pass over all parameters, against other ways to add scale * z."""

import pytest
from providers import PROVIDERS
from shapes import FLOATS, SHAPES


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_perturb(measure, shape, dtype, provider):
    measure("perturb", shape, dtype, provider)
