"""Budget of a run: a number of steps, or minutes that hold everything that the run does."""

from __future__ import annotations

import time

MOST_RESERVED = 0.15
"""Part of the time that is kept for what follows training, at most."""


class Budget:
    """Budget of a run.

    Args:
        steps: number of steps, or None.
        minutes: duration, if there is no number of steps.

    Attributes:
        seconds: that the run has taken until the last `update`, in all its processes so far.
        reserve: seconds that the evaluation at the end will take.
    """

    def __init__(self, steps: int | None, minutes: float) -> None:
        self.steps, self.total = steps, 60 * minutes
        self.seconds, self.reserve = 0.0, 0.0
        self._earlier, self._began = 0.0, time.monotonic()

    def go_on_from(self, seconds: float) -> None:
        """Add the seconds that the run took before it was resumed."""
        self._earlier = self.seconds = seconds

    def measure(self) -> float:
        """Return the seconds that the run has taken."""
        return self._earlier + time.monotonic() - self._began

    def done(self, step: int) -> float:
        """Return the completed fraction of training, in [0, 1].

        Args:
            step: number of steps so far.
        """
        if self.steps is not None:
            return min(step / self.steps, 1.0)
        training = self.total - min(self.reserve, MOST_RESERVED * self.total)
        return min(self.seconds / training, 1.0)

    def shown(self, step: int) -> float:
        """Return the completed fraction of the whole run, for people."""
        return self.done(step) if self.steps is not None else min(self.seconds / self.total, 1.0)
