"""How a step ends when it does not succeed: it fails, or it is skipped."""

from __future__ import annotations

OTHER_PROGRAM = (
    "Another program uses this port: is --url the address of bargein? (The daemon prints its "
    "address when it starts.)"
)
SEE_LOG = "See the daemon's log for this session."


class StepFailed(Exception):
    """Something is not as it should be.

    Args:
        seen: what was seen, in plain words.
        advice: what to do about it.
    """

    def __init__(self, seen: str, advice: str) -> None:
        super().__init__(seen, advice)
        self.seen = seen
        self.advice = advice


class StepSkipped(Exception):
    """A step gives no result.

    Args:
        why: in plain words.
        advice: what to do about it.
        is_allowed: whether the whole examination can succeed without this step.
    """

    def __init__(self, why: str, advice: str = "", *, is_allowed: bool = False) -> None:
        super().__init__(why)
        self.why = why
        self.advice = advice
        self.is_allowed = is_allowed
