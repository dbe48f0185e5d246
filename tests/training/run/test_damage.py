"""Random mutations of a checkpoint's files: named, and the good one before is taken; never silence."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from taipan.errors import CheckpointError
from taipan.training.run.checkpoint import latest
from tests.training.run.test_checkpoint import names_in, save

__all__ = ["save"]  # a fixture


def mutate(content: bytes, draw: random.Random) -> bytes:
    """One to three random changes; never the same content."""
    mutated = bytearray(content)
    while bytes(mutated) == content:
        for _ in range(draw.randint(1, 3)):
            at, length = draw.randrange(len(mutated) + 1), draw.randint(1, 64)
            kind = draw.choice(["flip", "write", "insert", "remove", "zero", "cut", "double", "move"])
            piece = mutated[at : at + length]
            if kind == "flip" and at < len(mutated):
                mutated[at] ^= 1 << draw.randrange(8)
            elif kind == "write":
                mutated[at : at + length] = draw.randbytes(len(piece))
            elif kind == "insert":
                mutated[at:at] = draw.randbytes(length)
            elif kind == "remove":
                del mutated[at : at + length]
            elif kind == "zero":
                mutated[at : at + length] = bytes(len(piece))
            elif kind == "cut":
                del mutated[at:]
            elif kind == "double":
                mutated[at:at] = piece
            elif kind == "move":
                del mutated[at : at + length]
                to = draw.randrange(len(mutated) + 1)
                mutated[to:to] = piece
    return bytes(mutated)


def outcomes(save: Callable[[int], Path], run: Path, count: int, seed: int) -> dict[str, int]:
    """Mutate a file of the newer of two checkpoints, look, put it back; how many mutations each file had."""
    draw = random.Random(seed)
    good, bad = save(1), save(2)
    files = {name: (bad / name).read_bytes() for name in sorted(names_in(bad))}
    seen = dict.fromkeys(files, 0)
    for _ in range(count):
        name = draw.choice(list(files))
        (bad / name).write_bytes(mutate(files[name], draw))
        found = latest(run)
        assert found.path == good, name
        (problem,) = found.problems
        assert str(bad) in problem
        (bad / name).write_bytes(files[name])
        seen[name] += 1
    assert latest(run).path == bad
    return seen


def test_mutations_are_noticed(save: Callable[[int], Path], tmp_path: Path) -> None:
    outcomes(save, tmp_path, 60, seed=0)


@pytest.mark.slow
def test_many_mutations_are_noticed(save: Callable[[int], Path], tmp_path: Path) -> None:
    assert min(outcomes(save, tmp_path, 2000, seed=1).values()) > 100


def test_if_both_are_damaged_it_says_so(save: Callable[[int], Path], tmp_path: Path) -> None:
    draw = random.Random(2)
    for path in (save(1), save(2)):
        (path / "trainer.json").write_bytes(mutate((path / "trainer.json").read_bytes(), draw))
    with pytest.raises(CheckpointError, match="No checkpoint of .* is usable.*00000002.*00000001"):
        latest(tmp_path)
