"""What a check found: each law run, skipped with a reason, expected to fail, or failed."""

from __future__ import annotations

from typing import Literal

from attrs import field, frozen

Status = Literal["passed", "failed", "skipped", "expected"]
_MARKS: dict[Status, str] = {
    "passed": "ok",
    "failed": "FAILED",
    "skipped": "skipped",
    "expected": "expected to fail",
}


@frozen
class Finding:
    """One law and what became of it."""

    law: str
    statement: str
    status: Status
    detail: str = ""


@frozen
class Report:
    """The findings of one part. A check that ran no law has failed: it has shown nothing."""

    kind: str
    name: str
    findings: tuple[Finding, ...] = field(converter=tuple)

    def count(self, *statuses: Status) -> int:
        """Return how many findings have one of the statuses."""
        return sum(finding.status in statuses for finding in self.findings)

    @property
    def run(self) -> int:
        """Return how many laws ran, those that failed included."""
        return self.count("passed", "failed", "expected")

    @property
    def failures(self) -> tuple[Finding, ...]:
        """Return the laws that are broken."""
        return tuple(finding for finding in self.findings if finding.status == "failed")

    @property
    def ok(self) -> bool:
        """Return whether at least one law held and none is broken."""
        return self.count("passed") > 0 and not self.failures

    @property
    def summary(self) -> str:
        """Return the counts in one line."""
        text = (
            f"{self.kind} {self.name}: {self.run} run, {self.count('skipped')} skipped, "
            f"{self.count('expected')} expected to fail, {self.count('failed')} failed"
        )
        return text if self.count("passed") else f"{text}; no law held, so nothing is shown"

    def __str__(self) -> str:
        width = max((len(finding.law) for finding in self.findings), default=0)
        lines = [self.summary]
        for finding in self.findings:
            text = finding.statement if finding.status == "passed" else finding.detail
            if finding.status == "failed":
                text = f"{finding.statement}\n{'':{width + 22}}{finding.detail}"
            lines.append(f"  {finding.law:{width}}  {_MARKS[finding.status]:16}  {text}")
        return "\n".join(lines)
