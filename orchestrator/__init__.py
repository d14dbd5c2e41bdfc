"""Bitatlas composed: configuration, plan, store, worker, driver, report and command line.

`ray` is reached through `cluster` alone; torch and lm-eval are imported when they are needed.
"""

__version__ = "0.1.0"
