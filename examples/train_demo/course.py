"""Where in a course of training a call stands: time, steps, and which scales are learnt when."""

import collections
import time
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Course:
    """Which prefix lengths a part of the training cycles through, until a share of its time."""

    until: float
    cycle: tuple[int, ...]


# The whole sequence enters well before the rate begins to fall: the last scales start last, and
# a falling rate would leave them noisy.
COURSES = (Course(0.28, (7,)), Course(0.42, (10, 7)), Course(1.0, (13, 7, 10, 7)))


def course(fraction: float, count: int, cycle: Sequence[int] = ()) -> int:
    """The prefix length of step `count` after a fraction of the course, or of a fixed cycle."""
    if not cycle:
        cycle = next((c for c in COURSES if fraction < c.until), COURSES[-1]).cycle
    return cycle[count % len(cycle)]


@dataclass(frozen=True)
class Used:
    """What earlier calls of a course took of it: seconds of training alone, and steps."""

    seconds: float = 0.0
    steps: int = 0


@dataclass(frozen=True)
class Budget:
    """When a call stops, and which part of the whole course it covers.

    until: `time.time()` at which to stop. span: shares of the course, (0, 1) for all of it; a run
    that goes on from weights covers a later part. steps: at most so many in this call.
    course_seconds, course_steps: how long a course is that several calls share, of which earlier
    ones took `used`; the span is gone through in that time or these steps, and then all is over.
    """

    until: float
    span: tuple[float, float] = (0.0, 1.0)
    steps: int | None = None
    course_seconds: float | None = None
    course_steps: int | None = None
    used: Used = Used()

    def after(self, seconds: float, steps: int) -> Used:
        """What of the course is used after so much of this call."""
        return Used(self.used.seconds + seconds, self.used.steps + steps)

    def share(self, began: float, count: int) -> float:
        """How much of what the span covers is over, for a call that began then."""
        seconds = time.time() - began
        if self.course_steps is not None:
            return min(1.0, (self.used.steps + count) / self.course_steps)
        if self.course_seconds is not None:
            return min(1.0, (self.used.seconds + seconds) / self.course_seconds)
        return min(1.0, seconds / max(self.until - began, 1e-3))

    def fraction(self, began: float, count: int) -> float:
        """Where in the whole course a call that began then is now; its end is the end of `span`."""
        first, last = self.span
        return first + self.share(began, count) * (last - first)

    def over(self, began: float, count: int) -> bool:
        """Whether the call's time or steps, or the whole course, are used up."""
        shared = self.course_steps is not None or self.course_seconds is not None
        ended = shared and self.share(began, count) >= 1
        return ended or time.time() >= self.until or count == self.steps


@dataclass
class Record:
    """What a call did, for the log and the model card."""

    steps: collections.Counter = field(default_factory=collections.Counter)
    losses: dict[int, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    def show(self, fraction: float, rate: float) -> None:
        """Print the latest loss of every scale for every prefix length."""
        for scales, losses in sorted(self.losses.items()):
            values = " ".join(f"{v:.3f}" for v in losses)
            print(
                f"{self.seconds:.0f} s {fraction:.0%} rate {rate:.1e} | {scales} scales "
                f"x{self.steps[scales]}: {values}",
                flush=True,
            )
