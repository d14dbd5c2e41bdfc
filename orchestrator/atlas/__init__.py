"""The atlas: what a sweep measured, as terminal tables, atlas.md and a self-contained atlas.html.

Reads the store's Parquet files and nothing else. `load` reads, `tables` makes the map, and `terminal`, `markdown` and
`page` show it.
"""

from orchestrator.atlas.load import load
from orchestrator.atlas.report import ReportPaths, print_report, write_report
from orchestrator.atlas.rows import Atlas

__all__ = ["Atlas", "ReportPaths", "load", "print_report", "write_report"]
