"""Memory in large pages is memory."""

import torch

from taipan.native.memory import Arena, in_large_pages


def test_an_arena_holds_what_was_asked_for() -> None:
    arena = Arena([((3, 5), torch.bfloat16), ((0, 4), torch.float32), ((7,), torch.int8)])
    taken = [arena.take((3, 5), torch.bfloat16), arena.take((0, 4), torch.float32), arena.take((7,), torch.int8)]
    for number, tensor in enumerate(taken):
        assert tensor.eq(0).all()
        tensor.fill_(number + 1)
    assert [tensor.float().sum().item() for tensor in taken] == [15.0, 0.0, 21.0]


def test_copies_in_large_pages_are_copies() -> None:
    tensors = [torch.arange(6.0).view(2, 3).t(), torch.tensor(4.0), torch.empty(0, 2), torch.ones(5, dtype=torch.int8)]
    copies = in_large_pages(tensors)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert copy.equal(tensor)
        assert copy.dtype == tensor.dtype
        assert copy.data_ptr() % 64 == 0
        copy.zero_()
    assert tensors[1] == 4.0
