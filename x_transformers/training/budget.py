"""Budget of a run: a number of steps, or minutes that hold everything that the run does."""

from __future__ import annotations

import time

LOOK, FINAL = 2**13, 2**17
"""Tokens of an evaluation during the run, and at its end."""
MOST_RESERVED = 0.15
"""Part of the time that is kept for the evaluation at the end, at most."""
SAVING = 1.0
"""Seconds that are kept for the last checkpoint and the picture."""


class Budget:
    """Budget of a run.

    Args:
        steps: number of steps, or None.
        minutes: duration, if there is no number of steps.
        held_out: number of held-out tokens.

    Attributes:
        seconds: that the run has taken up to its last measurement, earlier processes of the same run included.
        asked: what was asked for, as plain data.
        spent: True for a run that was resumed after it had spent this budget.
    """

    def __init__(self, steps: int | None, minutes: float, held_out: int = FINAL) -> None:
        self.steps, self.total = steps, 60 * minutes
        self.held_out = min(held_out, FINAL)
        self.asked = {"steps": steps} if steps is not None else {"minutes": minutes}
        self.seconds, self.spent = 0.0, False
        self._earlier, self._began = 0.0, time.monotonic()
        self._seconds_per_token = 0.0

    def go_on_from(self, seconds: float, spent: object = None) -> None:
        """Add what the run took before it was resumed.

        Args:
            seconds: of it.
            spent: `asked` of a budget that it has spent.
        """
        self._earlier = self.seconds = seconds
        self.spent = spent == self.asked

    def measure(self) -> float:
        """Return the seconds that the run has taken."""
        return self._earlier + time.monotonic() - self._began

    def expect_evaluation(self, seconds_per_token: float) -> None:
        """Note how long the evaluation of a token takes, so that there is time for the last one."""
        self._seconds_per_token = seconds_per_token

    @property
    def reserve(self) -> float:
        """Seconds that are kept for what follows training."""
        return min(self._seconds_per_token * self.held_out, MOST_RESERVED * self.total) + SAVING

    def done(self, step: int) -> float:
        """Return the completed fraction of training, in [0, 1].

        Args:
            step: number of steps so far.
        """
        if self.spent:
            return 1.0
        if self.steps is not None:
            return min(step / self.steps, 1.0)
        return min(self.seconds / max(self.total - self.reserve, 1e-3), 1.0)

    def shown(self, step: int) -> float:
        """Return the completed fraction of the whole run, for people."""
        return self.done(step) if self.steps is not None else min(self.measure() / self.total, 1.0)

    def last_evaluation(self) -> int:
        """Return the number of tokens of the evaluation at the end: all that there is time for, but a few at least."""
        if self.steps is not None or not self._seconds_per_token:
            return FINAL
        tokens = (self.total - SAVING - self.seconds) / self._seconds_per_token
        return int(min(max(tokens, LOOK), FINAL))
