"""How much of a prompt is read at once, so that the streams that write do not wait."""

import time

from taipan.serving.prefixes import GRAIN

_WHOLE = 1024  # tokens read at once while no stream waits; whoever comes meanwhile waits for as many
_SHARE = 1.0  # between two steps a prompt may be read for about this much of the time of a step
_LAYER = 0.5  # and one layer of a piece may take this much of it
_SLOW = 0.25  # of what is measured a new value counts for so much


class Pace:
    """Times of decoding steps, and of the stretches of reading between them.

    A prompt is read in pieces, and a decoding step is due between two layers of a piece whenever reading has taken as
    long as a step. No step can be taken inside a layer, so pieces are as long as one layer of them may take.
    """

    def __init__(self) -> None:
        self.step_seconds = 0.0
        self._piece = GRAIN
        self._began = time.perf_counter()  # of the reading since the last step, or since the piece began
        self._mark = self._began  # when the last layer ended
        self._longest = 0.0

    def piece(self, *, alone: bool) -> int:
        """Tokens to read next; `alone` where no stream writes."""
        return _WHOLE if alone else self._piece

    def begin(self) -> None:
        """A piece begins."""
        self._began = self._mark = time.perf_counter()
        self._longest = 0.0

    def due(self) -> bool:
        """A layer of the piece has ended: whether a decoding step is due."""
        now = time.perf_counter()
        layer = now - self._mark
        self._longest = max(self._longest, layer)
        self._mark = now
        return now - self._began + layer / 2 >= _SHARE * self.step_seconds  # nearer to it now than after one more

    def stepped(self, seconds: float) -> None:
        """A decoding step took so long; what is being read goes on now."""
        self.step_seconds += (seconds - self.step_seconds) * (1.0 if self.step_seconds == 0 else _SLOW)
        self._began = self._mark = time.perf_counter()

    def end(self, tokens: int) -> None:
        """A piece of so many tokens has been read: the next are shorter or longer, as its longest layer was."""
        if self._longest > 0 and self.step_seconds > 0:
            fitting = tokens * _LAYER * self.step_seconds / self._longest
            # towards it: at once where it is less, where it is more at most twice, for a short piece tells little
            fitting = min(fitting, 2 * max(tokens, self._piece))
            self._piece = max(GRAIN, min(_WHOLE, int(fitting) // GRAIN * GRAIN))
