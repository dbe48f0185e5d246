"""Which token comes next: from the logits of one step to one token of every row.

By the compiled kernels (native/kernels/choose.h) where they run, else by `taipan.generation.sampling`.
"""

import copy

import torch
from torch import Tensor

from taipan.errors import InputError
from taipan.generation import sampling
from taipan.generation.settings import GenerationSettings
from taipan.native import call, native_available
from taipan.native.interface import Choice, Choose, Pen
from taipan.seeding import seeded_generator
from taipan.shapes import BoolBT, BoolBV, FloatBV, IntB, IntBT


class Chooser:
    """Picks the next token of every row from its logits, and keeps track of the tokens seen.

    Args:
        settings: how to choose.
        vocabulary: number of ids.
        excluded: ids that are never picked, besides those of `settings`.

    Raises:
        InputError: no id would be left, or an id is out of range.
    """

    def __init__(self, settings: GenerationSettings, vocabulary: int, excluded: tuple[int, ...] = ()) -> None:
        self._settings = settings
        self._vocabulary = vocabulary
        ids = sorted({*excluded, *settings.suppress_tokens})
        if ids and ids[-1] >= vocabulary:
            raise InputError(f"suppress_tokens {ids[-1]} is out of range: this model knows ids 0 to {vocabulary - 1}.")
        if len(ids) == vocabulary:
            raise InputError("suppress_tokens leaves no token that could be drawn: leave some out.")
        self._excluded = torch.tensor(ids, dtype=torch.int64)
        self._how = Choice.of(
            sample=settings.do_sample,
            penalty=settings.repetition_penalty,
            temperature=settings.temperature,
            top_k=min(settings.top_k, vocabulary),
            top_p=settings.top_p,
            min_p=settings.min_p,
            excluded=self._excluded,
            excluded_count=len(ids),
        )
        self._seen_BV: BoolBV | None = None
        self._seed = 0
        if settings.do_sample:
            self._seed = settings.seed if settings.seed is not None else int(torch.randint(2**62, ()))
        self._generators: list[torch.Generator] = []
        self._ahead_S = torch.empty(0, dtype=torch.float64)  # random numbers of the only row, drawn and not used yet
        self._pen: Pen | None = None

    def hear(self, tokens_BT: IntBT, real_BT: BoolBT | None = None) -> None:
        """Record tokens of the rows, from the prompt or new; where `real_BT` is False there is none."""
        if self._settings.repetition_penalty == 1.0:
            return
        if self._seen_BV is None:
            self._seen_BV = self._nothing_seen(tokens_BT.shape[0], tokens_BT.device)
        if real_BT is None:
            self._seen_BV.scatter_(1, tokens_BT, True)
            return
        row_BT = torch.arange(tokens_BT.shape[0], device=tokens_BT.device)[:, None].expand_as(tokens_BT)
        self._seen_BV[row_BT[real_BT], tokens_BT[real_BT]] = True

    def _nothing_seen(self, rows: int, device: torch.device | str = "cpu") -> BoolBV:
        return torch.zeros((rows, self._vocabulary), dtype=torch.bool, device=device)

    def fork(self) -> "Chooser":
        """A copy that will choose what this one would: the same random numbers, which this one does not use up."""
        copied = copy.copy(self)
        copied._seen_BV = None if self._seen_BV is None else self._seen_BV.clone()
        copied._generators = [generator.clone_state() for generator in self._generators]
        copied._pen = None
        return copied

    def __call__(self, logits_BV: FloatBV) -> IntB:
        """The next token of each row.

        Raises:
            InputError: a row holds NaN or no token with a finite logit.
        """
        # PyTorch finds the likeliest as quickly
        if self._settings.do_sample and logits_BV.dtype == torch.float32 and native_available(logits_BV):
            token_B = torch.empty(len(logits_BV), dtype=torch.int64)
            rows, columns = logits_BV.shape
            logits_BV = logits_BV.contiguous()
            call(
                torch.float32,
                Choose,
                how=self._how,
                seen=self._seen_BV,
                uniform=self._uniform(rows),
                rows=rows,
                columns=columns,
                logits=logits_BV,
                tokens=token_B,
            )
            return self.checked(token_B)
        return self._by_sampling(logits_BV)

    def pen(self, steps: int, ends_E: Tensor) -> Pen:
        """How the only row writes so many tokens at most, in one call; say afterwards how many it `used`.

        Args:
            steps: of the call.
            ends_E: int64 ids after which no more are chosen; the same in every call, and alive meanwhile.
        """
        if self._pen is None:
            if self._settings.repetition_penalty != 1.0 and self._seen_BV is None:
                self._seen_BV = self._nothing_seen(1)
            self._pen = Pen.of(how=self._how, ends=ends_E, end_count=len(ends_E), seen=self._seen_BV, uniform=None)
        if self._settings.do_sample:
            self._pen.uniform = self.random_numbers(steps).data_ptr()
        return self._pen

    def random_numbers(self, count: int) -> Tensor:
        """The next random numbers of the only row, fp64 in [0, 1): the same however many are asked for at once."""
        missing = count - len(self._ahead_S)
        if missing > 0:
            more_S = torch.rand(missing, generator=self._of_rows(1)[0], dtype=torch.float64)
            self._ahead_S = torch.cat([self._ahead_S, more_S])
        return self._ahead_S[:count]

    def used(self, count: int) -> None:
        """So many tokens were chosen with a `pen`."""
        if self._settings.do_sample:
            self._ahead_S = self._ahead_S[count:]

    @staticmethod
    def checked(token_B: IntB) -> IntB:
        """Tokens that a kernel chose.

        Raises:
            InputError: it found none for a row.
        """
        rows: list[int] = (token_B < 0).nonzero()[:, 0].tolist()
        if rows:
            sampling.refuse(rows)
        return token_B

    def _by_sampling(self, logits_BV: FloatBV) -> IntB:
        settings = self._settings
        if len(self._excluded):
            logits_BV = logits_BV.index_fill(1, self._excluded.to(logits_BV.device), -torch.inf)
        if self._seen_BV is not None:
            logits_BV = sampling.apply_repetition_penalty(logits_BV, self._seen_BV, settings.repetition_penalty)
        if not settings.do_sample:
            return sampling.greedy(logits_BV)
        logits_BV = sampling.apply_temperature(logits_BV, settings.temperature)
        logits_BV = sampling.keep_top_k(logits_BV, settings.top_k)
        logits_BV = sampling.keep_top_p(logits_BV, settings.top_p)
        logits_BV = sampling.keep_min_p(logits_BV, settings.min_p)
        return sampling.draw(logits_BV, self._uniform(len(logits_BV)).to(logits_BV.device))

    def _uniform(self, rows: int) -> Tensor:
        """The next random number of each row, fp64 in [0, 1)."""
        if len(self._ahead_S):
            number_1 = self.random_numbers(1)
            self.used(1)
            return number_1
        return torch.stack([torch.rand((), generator=own, dtype=torch.float64) for own in self._of_rows(rows)])

    def _of_rows(self, rows: int) -> list[torch.Generator]:
        """One stream of random numbers per row, independent of the other rows."""
        if not self._generators:
            self._generators = [seeded_generator(self._seed, "sampling", row) for row in range(rows)]
        return self._generators
