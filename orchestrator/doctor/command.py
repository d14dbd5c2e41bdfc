"""Printing what the doctor finds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.doctor.checks import diagnose
from orchestrator.doctor.gather import gather
from orchestrator.doctor.world import Finding

OK, WOULD_FAIL = 0, 1


def doctor_command(
    sweep: Path | None = None,
    *,
    out: Path | None = None,
    address: str | None = None,
    workers: int | None = None,
    as_json: bool = False,
) -> int:
    """Print all findings; 1 if a sweep would fail."""
    console = Console()
    if as_json:
        findings = diagnose(gather(sweep, out=out, address=address, workers=workers))
        print(as_text(findings))
    else:
        with console.status("looking (torch is loaded in a process of its own) ..."):
            findings = diagnose(gather(sweep, out=out, address=address, workers=workers))
        console.print(as_table(findings))
    return WOULD_FAIL if any(finding.fatal for finding in findings) else OK


def as_text(findings: Sequence[Finding]) -> str:
    """JSON: a list of findings, each with `subject`, `found`, `remedy` (empty where nothing is wrong) and `fatal`."""
    return json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1)


def as_table(findings: Sequence[Finding]) -> Table:
    """Findings for a person: `x` stops a sweep, `!` does not."""
    table = Table(box=None, padding=(0, 1))
    for heading in ("", "what", "found", "remedy"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        mark = "[red]x[/red]" if finding.fatal else "[yellow]![/yellow]" if finding.remedy else "[green]ok[/green]"
        # Messages of others may hold brackets, which are no markup.
        table.add_row(mark, *(Text(told) for told in (finding.subject, finding.found, finding.remedy)))
    return table
