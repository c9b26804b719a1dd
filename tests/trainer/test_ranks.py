"""Two processes of accelerate: they exchange scalars, and end with one theta. The only proof of it, so not slow."""

import trainer as bench

from tests.tiny_models import save


def test_two_processes_exchange_scalars_and_hold_one_theta(tmp_path):
    """The adapter is drawn at random on each process: the Trainer's broadcast at the start must reach the optimizer."""
    found = bench.two_processes("MeZO, adapter", save("llama", tmp_path / "model"))
    assert found["equal"]
    assert 0 < found["sent"] < 2048
    assert 0 < found["received"] < 2048
    assert 4 * found["trained"] > 20 * found["sent"], "what gradients would take"
