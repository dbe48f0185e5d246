"""Randomness as a function: every stream of random numbers comes from a seed and the numbers that name the stream."""

import hashlib

import torch


def derive_seed(seed: int, *stream: int | str) -> int:
    """Return a 63-bit seed that depends on ``seed`` and on every part of the stream's name.

    Streams with different names are independent, on any machine and in any process: the value is a keyed hash,
    not the state of a generator.
    """
    name = "\0".join(repr(part) for part in (seed, *stream))
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seeded_generator(seed: int, *stream: int | str) -> torch.Generator:
    """Return a CPU generator for one named stream of random numbers, for example ``(seed, "mqar", step)``."""
    generator = torch.Generator()
    generator.manual_seed(derive_seed(seed, *stream))
    return generator
