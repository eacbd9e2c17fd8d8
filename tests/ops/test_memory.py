"""Memory: what is kept between passes, and zeroed memory for results."""

import threading

import pytest
import torch

from fastfip.ops.memory import CHUNK, Scratch, kept_scratch, zeros_like


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5), (), (0,), (1100, 1024), (7, 3, 450, 333)])
def test_zeros_like(shape, dtype):
    source = torch.full(shape, 3.0, dtype=torch.bfloat16)
    got = zeros_like(source, dtype)
    assert got.shape == source.shape and got.dtype == dtype and got.is_contiguous() and not got.any()
    assert got.untyped_storage().nbytes() <= got.nbytes + 64  # its own memory: it can be saved by itself
    got += 1
    assert got.sum() == got.numel() and (got.numel() == 0 or got.data_ptr() % 64 == 0)
    assert not zeros_like(source, dtype).any()


def test_zeros_like_keeps_the_memory_format():
    source = torch.zeros(16, 64, 40, 40).to(memory_format=torch.channels_last)
    assert zeros_like(source, torch.float32).stride() == source.stride()


def test_scratch_is_kept_for_a_thread_but_not_large_buffers():
    like = torch.zeros(1)
    kept_scratch().take((100,), like, slot=7)
    again = kept_scratch()
    assert (
        isinstance(again, Scratch)
        and again.take((50,), like, slot=7).data_ptr() == again.take((100,), like, slot=7).data_ptr()
    )
    before = again.take((100,), like, slot=7).data_ptr()
    assert kept_scratch().take((100,), like, slot=7).data_ptr() == before
    kept_scratch().take((CHUNK + 1,), like, slot=8)
    assert all(buffer.numel() <= CHUNK for buffer in kept_scratch()._buffers.values())
    other = []
    thread = threading.Thread(target=lambda: other.append(kept_scratch()))
    thread.start()
    thread.join()
    assert other[0] is not again
