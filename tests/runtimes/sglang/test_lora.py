"""Products of adapters of the engine on a CPU: many adapters in one call, equal to the engine's own of one a call."""

import dataclasses
import importlib
from types import SimpleNamespace

import pytest
import torch

SLOTS, RANK, INPUTS = 9, 4, 12
RANKS = [0, 4, 4, 4, 4, 2, 4, 4, 4]  # slot 0 is the base's, one adapter is narrower
SCALINGS = [1 / 3] * 7 + [2.0, 1 / 3]
BATCHES = {  # (slot, rows) of each segment
    "decoding, slots in order": [(slot, 1) for slot in (1, 2, 3, 4)],
    "decoding, any order": [(slot, 1) for slot in (3, 1, 2, 4, 7, 6, 8)],
    "several prompts each, a pair, a run": [(1, 3), (2, 3), (2, 2), (3, 2), (4, 2), (6, 2)],
    "slots between them unused": [(1, 2), (3, 2), (4, 2), (6, 2)],
    "slots in order, of several ranks": [(slot, 2) for slot in (1, 2, 3, 4, 5, 6, 7, 8)],
    "prompts of any length": [(3, 5), (1, 2), (4, 5), (2, 7), (6, 1)],
    "a slot comes again": [(1, 2), (2, 2), (1, 2), (3, 2), (1, 2), (2, 3)],
    "the base among them": [(0, 2), (1, 2), (2, 2), (0, 1), (3, 2), (5, 2), (5, 0)],
    "the base alone": [(0, 4)],
}


@pytest.fixture
def info():
    backend = pytest.importorskip("sglang.srt.lora.backend.torch_backend")
    empty = torch.empty(0)

    def made(segments):
        slots, lengths = (torch.tensor(column, dtype=torch.int32) for column in zip(*segments, strict=True))
        fields = {field.name: empty for field in dataclasses.fields(backend.TorchNativeLoRABatchInfo) if field.init} | {
            "use_cuda_graph": False,
            "num_segments": len(segments),
        }
        one = backend.TorchNativeLoRABatchInfo(**fields)
        one.weight_indices_cpu, one.seg_lens_cpu = slots, lengths
        one.lora_ranks_cpu = torch.tensor(RANKS, dtype=torch.int32)
        one.scalings_cpu = torch.tensor(SCALINGS)
        return one

    return made


def refused(*args, **kwargs):
    pytest.fail("the engine's own was called")


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("name", list(BATCHES))
def test_adapters_together_are_each_alone(info, name, slices):
    from sglang.srt.lora import torch_ops

    from mezo.runtimes.sglang.inside import lora

    draw = torch.Generator().manual_seed(0)
    batch, rows = info(BATCHES[name]), sum(length for _, length in BATCHES[name])
    ends = torch.tensor([0, 6, 10, 13][: slices + 1])
    x = torch.randn(rows, INPUTS, generator=draw)
    a = torch.randn(SLOTS, slices * RANK, INPUTS, generator=draw)
    b = torch.randn(SLOTS, int(ends[-1]), RANK, generator=draw)
    base = torch.randn(rows, int(ends[-1]), generator=draw)
    shrunk = torch_ops.sgemm_lora_a_fwd(x, a, batch, slices)
    ours = lora.shrink(refused, x, a, batch, num_slices=slices)
    assert torch.allclose(ours, shrunk, atol=1e-5)
    for output in (None, base):
        expected = torch_ops.sgemm_lora_b_fwd(shrunk, b, batch, ends, None if output is None else output.clone())
        given = None if output is None else output.clone()
        got = lora.expand(refused, ours, b, batch, slice_offsets=ends, base_output=given)
        assert torch.allclose(got, expected, atol=1e-4)
        assert given is None or got is given


def test_segments_of_one_length_and_slots_in_order_are_one_product(info):
    from mezo.runtimes.sglang.inside import lora

    def runs(name):
        return [(run.segments, run.length, run.slot) for run in lora.plan_of(info(BATCHES[name])).runs]

    assert runs("decoding, slots in order") == [(4, 1, 1)]
    assert runs("decoding, any order") == [(1, 1, slot) for slot in (3, 1, 2, 4, 7, 6, 8)]
    assert runs("several prompts each, a pair, a run") == [(1, 3, 1), (1, 3, 2), (3, 2, 2), (1, 2, 6)]
    assert runs("slots in order, of several ranks") == [(4, 2, 1), (1, 2, 5), (1, 2, 6), (1, 2, 7), (1, 2, 8)]
    assert runs("the base alone") == [(1, 4, 0)]


def chunked(segments):
    """SGLang's backend csgmv, prepared for a batch as in an engine on a GPU, but for memory that is not pinned."""
    from sglang.srt.lora.backend import chunked_backend
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    lengths = torch.tensor([length for _, length in segments], dtype=torch.int32)
    rows, empty = int(lengths.sum()), torch.empty(0)
    batch = ForwardBatch(ForwardMode.EXTEND, len(segments), empty, empty, lengths, empty, rows)
    batch.extend_seq_lens, batch.extend_seq_lens_cpu, batch.extend_num_tokens = lengths, lengths.tolist(), rows
    backend = chunked_backend.ChunkedSgmvLoRABackend(SLOTS, torch.device("cpu"), None)
    backend.prepare_lora_batch(batch, [slot for slot, _ in segments], RANKS, SCALINGS, use_cuda_graph=False)
    return backend


@pytest.fixture(scope="module")
def interpreted():
    """csgmv's kernels in Triton's interpreter, and no tuned sizes, of which there are none for a CPU."""
    chunked_backend = pytest.importorskip("sglang.srt.lora.backend.chunked_backend")
    from sglang.kernels.ops.lora.dense import chunked_sgmv_expand, chunked_sgmv_shrink, lora_tuning_config

    from mezo.runtimes.sglang.inside.plugin import _UnpinnedTorch

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # is read where a kernel is defined
        for module in (chunked_sgmv_shrink, chunked_sgmv_expand, chunked_backend):
            importlib.reload(module)
        patch.setattr(chunked_backend, "torch", _UnpinnedTorch(torch))
        patch.setattr(lora_tuning_config, "get_device_name", lambda: "CPU")
        patch.setattr(chunked_backend, "get_lora", lambda: SimpleNamespace(max_lora_chunk_size=16))  # the default
        yield


@pytest.mark.parametrize("name", list(BATCHES))
def test_kernels_of_a_gpu_s_default_give_a_row_the_same_bits_in_every_batch(info, interpreted, name):
    """csgmv, interpreted: every adapter's rows alone have the bits of the mixed batch, and are the products."""
    from sglang.srt.lora import torch_ops

    draw, segments = torch.Generator().manual_seed(0), [one for one in BATCHES[name] if one[1]]
    rows, ends = sum(length for _, length in segments), torch.tensor([0, 6, 10, 13])
    x = torch.randn(rows, INPUTS, generator=draw)
    a, b = torch.randn(SLOTS, 3 * RANK, INPUTS, generator=draw), torch.randn(SLOTS, 13, RANK, generator=draw)
    base = torch.randn(rows, 13, generator=draw)

    def product(segments, at):
        backend = chunked(segments)
        return backend.run_qkv_lora(x[at], a, b, ends, 6, base_output=base[at].clone())

    mixed, start = product(segments, slice(None)), 0
    batch = info(segments)
    expected = torch_ops.sgemm_lora_b_fwd(torch_ops.sgemm_lora_a_fwd(x, a, batch, 3), b, batch, ends, base.clone())
    assert torch.allclose(mixed, expected, atol=1e-4)
    for slot, length in segments:
        at = slice(start, start := start + length)
        assert torch.equal(product([(slot, length)], at), mixed[at])
