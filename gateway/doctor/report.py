"""The results of an examination, as text for people and as JSON for machines."""

from __future__ import annotations

import contextlib
import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TextIO

from gateway.doctor.steps import STEPS, Step
from gateway.doctor.target import Target
from gateway.doctor.wording import count


class Status(enum.StrEnum):
    """How a step went."""

    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Result:
    """How a step went, what was seen, and what to do about it."""

    step: Step
    status: Status
    seen: str
    advice: str
    ms: float
    """How long it took."""
    is_required: bool = True
    """False where the examination succeeds although this step was skipped."""


@dataclass(frozen=True)
class Report:
    """What an examination found."""

    url: str
    results: tuple[Result, ...]
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether every step went well; the metrics may have been out of reach."""
        return all(one.status is Status.OK or not one.is_required for one in self.results)

    def as_json(self) -> str:
        """For machines, in one object."""
        steps = [
            {
                "step": one.step.name,
                "title": one.step.title,
                "status": one.status.value,
                "ok": None if one.status is Status.SKIPPED else one.status is Status.OK,
                "seen": one.seen,
                "advice": one.advice or None,
                "ms": round(one.ms, 1),
            }
            for one in self.results
        ]
        whole = {"ok": self.holds, "url": self.url, "seconds": round(self.seconds, 3)}
        return json.dumps(whole | {"steps": steps}, indent=2, ensure_ascii=False)


def print_json(report: Report, out: TextIO) -> None:
    """Print a report for machines, with escapes for characters that `out` cannot encode."""
    text = report.as_json()
    try:
        text.encode(out.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        text = json.dumps(json.loads(text), indent=2)
    with contextlib.suppress(OSError):  # the reader of a pipe may have gone
        print(text, file=out, flush=True)


class TextRenderer:
    """Prints the report for people, each line as soon as its step has ended.

    Args:
        out: prints here. Uses colours only on a terminal, and only characters that it can show.
        environ: `NO_COLOR` switches colours off.
    """

    _SIGNS: ClassVar = {
        Status.OK: ("✓", "32"),
        Status.FAILED: ("✗", "31"),
        Status.SKIPPED: ("–", "33"),
    }
    _PLAIN: ClassVar = {Status.OK: "ok  ", Status.FAILED: "FAIL", Status.SKIPPED: "skip"}
    _WIDTH = max(len(step.title) for step in STEPS)

    def __init__(self, out: TextIO, environ: Mapping[str, str]) -> None:
        self._out = out
        self._is_coloured = out.isatty() and not environ.get("NO_COLOR")
        self._encoding = out.encoding or "utf-8"

    def begin(self, target: Target) -> None:
        """The first line."""
        self._say(f"bargein doctor: {target.shown}")

    def show(self, result: Result) -> None:
        """One step."""
        sign, colour = self._SIGNS[result.status]
        if not self._can_show(sign):
            sign = self._PLAIN[result.status]
        if self._is_coloured:
            sign = f"\x1b[{colour}m{sign}\x1b[0m"
        why = "skipped: " if result.status is Status.SKIPPED else ""
        self._say(f"{sign} {result.step.title:<{self._WIDTH}}  {why}{result.seen}")
        if result.advice:
            self._say(f"    {'→' if self._can_show('→') else '->'} {result.advice}")

    def end(self, report: Report) -> None:
        """The last line."""
        failed = [one for one in report.results if one.status is Status.FAILED]
        skipped = [one for one in report.results if one.status is Status.SKIPPED]
        if failed:
            words = f"{len(failed)} of {len(report.results)} steps failed"
            words += f", {len(skipped)} could not be tried" if skipped else ""
            words += f". Begin with “{failed[0].step.title}”."
        elif not report.holds:
            words = f"Nothing failed, but {count(len(skipped), 'step')} gave no result."
        elif skipped:
            words = "All is well; the metrics were not checked."
        else:
            words = "All is well."
        self._say(f"{words} ({report.seconds:.1f} s)")

    def _can_show(self, sign: str) -> bool:
        try:
            sign.encode(self._encoding)
        except (UnicodeEncodeError, LookupError):
            return False
        return True

    def _say(self, line: str) -> None:
        shown = line.encode(self._encoding, "replace").decode(self._encoding)
        with contextlib.suppress(OSError):  # the reader of a pipe may have gone
            print(shown, file=self._out, flush=True)
