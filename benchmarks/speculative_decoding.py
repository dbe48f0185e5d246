"""What a draft gains: tokens per second with and without one, in turns in one process.

    python benchmarks/speculative_decoding.py --model taipan-190m --dtype bfloat16
    python benchmarks/speculative_decoding.py --model DIR --prompt FILE [--draft DIR]

Of a preset (random weights) the draft knows the text and is right with the given chances, at no cost: the most that any
draft of that quality can gain. Of a directory it is another directory, or the text so far (`LookupDraft`). Two threads.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from taipan import TaipanConfig, TaipanLM
from taipan.generation import Draft, LookupDraft, ModelDraft, prefill, stream
from taipan.text import load


class Oracle:
    """Guesses the text itself, each token wrong with a chance."""

    def __init__(self, text: list[int], right: float, tokens: int) -> None:
        self.text, self.share, self.tokens = text, right, tokens
        self.at = self.guessed = self.right = 0
        self.generator = torch.Generator().manual_seed(0)

    def hear(self, tokens_BT: Any, real_BT: Any = None) -> None:
        """Nothing to learn from a prompt."""

    def guess(self, written: list[int], most: int, choose: Any) -> list[int]:
        """The next tokens, some of them wrong."""
        self.at += len(written)
        good = torch.rand(most, generator=self.generator) < self.share
        return [
            token if ok else token ^ 1 for token, ok in zip(self.text[self.at : self.at + most], good, strict=False)
        ]


def timed(model: TaipanLM, reading: Any, new: int, draft: Draft | None) -> tuple[float, list[int]]:
    """Seconds and tokens of a text after a reading."""
    start = time.perf_counter()
    steps = stream(model, reading, draft=draft, max_new_tokens=new, eos_token_id=())
    tokens = [int(step.tokens_B[0]) for step in steps]
    return time.perf_counter() - start, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="taipan-190m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--draft")
    parser.add_argument("--prompt", type=Path)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--right", type=float, nargs="+", default=[0.5, 0.8, 0.95])
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(2)
    if Path(given.model).is_dir():
        text = load(given.model, dtype=given.dtype)
        model, ids = text.model, text.tokenizer.encode(given.prompt.read_text(encoding="utf-8"))
        other = None if given.draft is None else text.draft_of(load(given.draft, dtype=given.dtype)).model
    else:
        model = TaipanLM(TaipanConfig.preset(given.model)).to(getattr(torch, given.dtype)).eval()
        ids, other = torch.randint(0, model.config.vocab_size, (256,)).tolist(), None
    reading = prefill(model, torch.tensor([ids]))
    _, plain = timed(model, reading, given.new_tokens, None)

    def drafts() -> dict[str, Draft]:
        if not Path(given.model).is_dir():
            cases = [(right, tokens) for right in given.right for tokens in given.tokens]
            return {f"{tokens} guesses, {right:.0%} right": Oracle(plain, right, tokens) for right, tokens in cases}
        made: dict[str, Draft] = {
            f"{tokens} guesses": LookupDraft(tokens) if other is None else ModelDraft(other, tokens)
            for tokens in given.tokens
        }
        for draft in made.values():
            draft.hear(torch.tensor([ids]))
        return made

    seconds: dict[str, list[float]] = {}
    said: dict[str, str] = {}
    for _ in range(given.repeats):
        for name, draft in {"none": None, **drafts()}.items():
            took, tokens = timed(model, reading, given.new_tokens, draft)
            seconds.setdefault(name, []).append(took)
            right = "" if draft is None else f"{draft.right} of {draft.guessed} right"
            said[name] = f"{right}{'' if tokens == plain else ', another text (rounding)'}"
    alone = statistics.median(seconds["none"])
    print(f"{given.model}, {given.dtype}, {given.new_tokens} tokens after {len(ids)}")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"  {name:28s} {given.new_tokens / median:8.1f} tokens/s  {alone / median:5.2f} x  {said[name]}")


if __name__ == "__main__":
    main()
