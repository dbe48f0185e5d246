"""What a draft gains: tokens per second with and without one, in turns in one process, in both faces.

    python benchmarks/speculative_decoding.py --model taipan-190m --dtype bfloat16
    python benchmarks/speculative_decoding.py --model DIR --prompt FILE [--draft DIR]

Of a preset (random weights) the draft knows the text and is right with the given chances, at no cost: the most that any
draft of that quality can gain. Of a directory it is another directory, or the text so far (prompt lookup). The native
face goes on after the prompt; `generate` of transformers reads the prompt each time. Two threads.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from taipan import TaipanConfig, TaipanLM
from taipan.generation import Draft, LookupDraft, ModelDraft, prefill, stream
from taipan.text import load

Write = Callable[[], tuple[list[int], str]]
"""Writes the text; returns it, and what there is to say of the draft."""


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


class Native:
    """The native face: continues what has been read once.

    Args:
        model: reads and writes.
        other: guesses; None for the text so far, or for an oracle.
        ids: the prompt.
        new: tokens to write.
    """

    def __init__(self, model: TaipanLM, other: TaipanLM | None, ids: list[int], new: int) -> None:
        self.model, self.other, self.ids, self.new = model, other, ids, new
        self.reading = prefill(model, torch.tensor([ids]))

    def write(self, make: Callable[[], Draft] | None = None) -> tuple[list[int], str]:
        draft = None if make is None else make()
        steps = stream(self.model, self.reading, draft=draft, max_new_tokens=self.new, eos_token_id=())
        tokens = [int(step.tokens_B[0]) for step in steps]
        return tokens, "" if draft is None else f"{draft.right} of {draft.guessed} right"

    def told(self, text: list[int], right: float, tokens: int) -> Write:
        return partial(self.write, lambda: Oracle(text, right, tokens))

    def guessing(self, tokens: int) -> Write:
        def make() -> Draft:
            draft = LookupDraft(tokens) if self.other is None else ModelDraft(self.other, tokens)
            draft.hear(torch.tensor([self.ids]))
            return draft

        return partial(self.write, make)


class Face:
    """`generate` of transformers, greedy; arguments as of `Native`."""

    def __init__(self, model: Any, other: Any, ids: list[int], new: int) -> None:
        self.model, self.other, self.ids, self.new = model, other, ids, new

    def write(self, oracle: Any = None, **options: Any) -> tuple[list[int], str]:
        if oracle is not None:
            self.model._get_candidate_generator = lambda **_: oracle()
        tokens = torch.tensor([self.ids])
        limits = {"max_new_tokens": self.new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out = self.model.generate(tokens, attention_mask=torch.ones_like(tokens), **limits, **options)
        if oracle is not None:
            del self.model._get_candidate_generator
        return out[0, len(self.ids) :].tolist(), ""

    def told(self, text: list[int], right: float, tokens: int) -> Write:
        from transformers.generation.candidate_generator import CandidateGenerator

        class Told(CandidateGenerator):
            def __init__(self, begin: int) -> None:
                self.begin, self.oracle = begin, Oracle(text, right, tokens)

            def get_candidates(self, input_ids: Any, **_: Any) -> Any:
                self.oracle.at = input_ids.shape[1] - self.begin
                most = min(tokens, len(text) - self.oracle.at - 1)
                guesses = self.oracle.guess([], most, None) if most > 0 else []
                return torch.cat([input_ids, input_ids.new_tensor([guesses])], 1), None

        return partial(self.write, partial(Told, len(self.ids)), prompt_lookup_num_tokens=tokens)

    def guessing(self, tokens: int) -> Write:
        if self.other is None:
            return partial(self.write, prompt_lookup_num_tokens=tokens)
        self.other.generation_config.num_assistant_tokens = tokens
        self.other.generation_config.num_assistant_tokens_schedule = "constant"
        return partial(self.write, assistant_model=self.other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="taipan-190m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--draft")
    parser.add_argument("--prompt", type=Path)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--right", type=float, nargs="+", default=[0.8, 0.95])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--faces", nargs="+", choices=["native", "transformers"], default=["native", "transformers"])
    given = parser.parse_args()
    torch.set_num_threads(2)
    dtype, trained = getattr(torch, given.dtype), Path(given.model).is_dir()
    if trained:
        text = load(given.model, dtype=given.dtype)
        model, ids = text.model, text.tokenizer.encode(given.prompt.read_text(encoding="utf-8"))
        other = None if given.draft is None else text.draft_of(load(given.draft, dtype=given.dtype)).model
    else:
        model = TaipanLM(TaipanConfig.preset(given.model)).to(dtype).eval()
        ids, other = torch.randint(0, model.config.vocab_size, (256,)).tolist(), None
    faces: dict[str, Native | Face] = {}
    if "native" in given.faces:
        faces["native"] = Native(model, other, ids, given.new_tokens)
    if "transformers" in given.faces:
        faces["transformers"] = Face(*(each and face_of(each) for each in (model, other)), ids, given.new_tokens)
    print(f"{given.model}, {given.dtype}, {given.new_tokens} tokens after {len(ids)}")
    for name, face in faces.items():
        with torch.inference_mode():
            compare(name, face, given, trained)


def face_of(model: TaipanLM) -> Any:
    """The same weights as a model of transformers."""
    from taipan.hf import TaipanForCausalLM, TaipanHFConfig

    face = TaipanForCausalLM(TaipanHFConfig.from_native(model.config))
    face.load_state_dict(model.state_dict(), assign=True, strict=False)
    face.tie_weights()
    return face.eval()


def compare(name: str, face: Native | Face, given: argparse.Namespace, trained: bool) -> None:
    """Time every draft in turns and print the medians."""
    plain, _ = face.write()
    writers: dict[str, Write] = {"none": face.write}
    for tokens in given.tokens:
        if trained:
            writers[f"{tokens} guesses"] = face.guessing(tokens)
        else:
            for right in given.right:
                writers[f"{tokens} guesses, {right:.0%} right"] = face.told(plain, right, tokens)
    seconds: dict[str, list[float]] = {}
    said: dict[str, str] = {}
    for _ in range(given.repeats):
        for draft, write in writers.items():
            start = time.perf_counter()
            tokens, remark = write()
            seconds.setdefault(draft, []).append(time.perf_counter() - start)
            said[draft] = remark + ("" if tokens == plain else ", another text (rounding)")
    alone = statistics.median(seconds["none"])
    for draft, values in seconds.items():
        median = statistics.median(values)
        speed = f"{given.new_tokens / median:8.1f} tokens/s  {alone / median:5.2f} x"
        print(f"  {name:12s}  {draft:24s} {speed}  {said[draft]}")


if __name__ == "__main__":
    main()
