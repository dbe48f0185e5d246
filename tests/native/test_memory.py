"""Memory in large pages is memory."""

import torch

from taipan.native.memory import Arena


def test_an_arena_holds_what_was_asked_for() -> None:
    arena = Arena([((3, 5), torch.bfloat16), ((0, 4), torch.float32), ((7,), torch.int8)])
    taken = [arena.take((3, 5), torch.bfloat16), arena.take((0, 4), torch.float32), arena.take((7,), torch.int8)]
    for number, tensor in enumerate(taken):
        assert tensor.eq(0).all()
        tensor.fill_(number + 1)
    assert [tensor.float().sum().item() for tensor in taken] == [15.0, 0.0, 21.0]
