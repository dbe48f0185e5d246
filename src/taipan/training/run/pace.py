"""How far a run has come, for a length in steps or in seconds."""

from dataclasses import dataclass
from typing import Any


@dataclass
class Pace:
    """Steps, tokens and time of a run, over all its resumes.

    Attributes:
        total_steps: length of the run, or None when it is given in seconds.
        total_seconds: length of the run, or None when it is given in steps.
        step: steps taken.
        tokens: tokens read.
        seconds: time of the loop, evaluations and checkpoints included.
        step_seconds: time of the last step.
    """

    total_steps: int | None
    total_seconds: float | None
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0

    @property
    def next_progress(self) -> float:
        """Fraction of training in the middle of the next step, where its schedules are read."""
        return min(1.0, self._fraction(self.step + 0.5, self.seconds + self.step_seconds / 2))

    @property
    def fraction(self) -> float:
        """Fraction of training done."""
        return min(1.0, self._fraction(float(self.step), self.seconds))

    @property
    def done(self) -> bool:
        """Whether no step is left; by time, whether one more would end further from the limit than stopping does."""
        if self.total_steps is not None:
            return self.step >= self.total_steps
        return self.step > 0 and self._fraction(float(self.step), self.seconds + self.step_seconds / 2) >= 1.0

    @property
    def seconds_left(self) -> float:
        """Estimated time to the end."""
        if self.total_seconds is not None:
            return max(0.0, self.total_seconds - self.seconds)
        assert self.total_steps is not None
        return (self.total_steps - self.step) * self.seconds / max(1, self.step)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: what was done, not how long the run is to be."""
        return {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "step_seconds": self.step_seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.step, self.tokens = state["step"], state["tokens"]
        self.seconds, self.step_seconds = state["seconds"], state["step_seconds"]

    def _fraction(self, steps: float, seconds: float) -> float:
        if self.total_steps is not None:
            return steps / self.total_steps
        assert self.total_seconds is not None
        return seconds / self.total_seconds
