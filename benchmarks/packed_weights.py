"""What it costs to see that weights did not change since they were packed, beside a training step and a generation.

    python benchmarks/packed_weights.py [--preset taipan-190m] [--repeats 9]

A text begins with that check (`taipan.generation.program.DecoderProgram.is_current`), a sample in training too: there
in the format `auto`. Medians of repetitions in turn; a step is one forward and backward of 4 x 512 tokens without the
optimizer, a generation 256 tokens.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from taipan import TaipanConfig, TaipanLM
from taipan.generation import start_decoding
from taipan.generation.program import program_of

NEW_TOKENS = 256


def seconds(what: Callable[[], object]) -> float:
    """Wall time of one call."""
    begun = time.perf_counter()
    what()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="taipan-190m", choices=TaipanConfig.presets())
    parser.add_argument("--repeats", type=int, default=9)
    asked = parser.parse_args()
    model = TaipanLM(TaipanConfig.preset(asked.preset))
    tokens = torch.randint(0, model.config.vocab_size, (4, 512))

    def step() -> None:
        loss = model.train()(tokens, labels=tokens).loss
        assert loss is not None
        loss.backward()
        model.zero_grad()

    def tokens_of(weights: str) -> Callable[[], None]:
        decoding = start_decoding(model.eval(), model.empty_state(1), weights=weights)

        def some() -> None:
            for token in range(8):
                decoding.step(torch.tensor([token]))

        return some

    for weights in ("auto", "bfloat16", "int8"):
        program = program_of(model.eval(), weights)
        assert program is not None

        def check(weights: str = weights) -> None:
            assert program_of(model, weights) is not None

        works = {"check": check, "step": step, "tokens": tokens_of(weights)}
        for work in works.values():
            work()
        taken = [{name: seconds(work) for name, work in works.items()} for _ in range(asked.repeats)]
        median = {name: statistics.median(times[name] for times in taken) for name in works}
        generation = median["tokens"] / 8 * NEW_TOKENS
        print(
            f"{asked.preset}, {weights}: the check takes {1000 * median['check']:.2f} ms, "
            f"{100 * median['check'] / median['step']:.2f} % of a training step ({median['step']:.2f} s), "
            f"{100 * median['check'] / generation:.2f} % of a generation of {NEW_TOKENS} tokens"
        )


if __name__ == "__main__":
    main()
