"""What a runtime is, by type: both have all of `Runtime`, and each says what else it has."""

import inspect

import pytest

from mezo.errors import UserError
from mezo.runtimes.base import Differentiable, Follower, Grows, InitialTheta, Runtime, Savable, require
from mezo.runtimes.hf.runtime import HFRuntime

MORE = {"hf": {Differentiable, Grows, InitialTheta, Savable}, "sglang": {Follower, Grows, InitialTheta}}


def runtime_class(name):
    if name == "hf":
        return HFRuntime
    pytest.importorskip("sglang")
    from mezo.runtimes.sglang.runtime import SGLangRuntime

    return SGLangRuntime


def methods(kind):
    return {name: method for name, method in vars(kind).items() if inspect.isfunction(method) and name[0] != "_"}


@pytest.mark.parametrize("name", list(MORE))
def test_every_public_method_is_in_the_protocol_or_in_one_beside_it(name):
    runtime, protocols = runtime_class(name), [Runtime, *MORE[name]]
    wanted = {method: form for kind in protocols for method, form in methods(kind).items()}
    assert set(methods(runtime)) == set(wanted)
    for method, form in wanted.items():
        assert list(inspect.signature(getattr(runtime, method)).parameters) == list(inspect.signature(form).parameters)
    assert {kind for kinds in MORE.values() for kind in kinds if issubclass(runtime, kind)} == MORE[name]


def test_what_a_runtime_lacks_is_refused_by_the_option_that_needs_it():
    bare = object.__new__(HFRuntime)
    assert require(bare, Savable, "--tuning full") is bare
    with pytest.raises(UserError, match="--engine-arg node_rank: HFRuntime is not Follower; use --runtime sglang"):
        require(bare, Follower, "--engine-arg node_rank", other="sglang")
