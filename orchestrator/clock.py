"""Time that never goes back, whatever the machine's clock does."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

_TICK = timedelta(microseconds=1)  # of the events table


class MonotoneClock:
    """UTC, but each time later than every one before: given out here, or told by `follow`."""

    def __init__(self) -> None:
        """Nothing was seen yet."""
        self._last: datetime | None = None

    def follow(self, moment: datetime | None) -> None:
        """All times to come are later than `moment`, which another clock, ahead of ours, may have told."""
        if moment is not None and (self._last is None or moment > self._last):
            self._last = moment

    def now(self) -> datetime:
        """UTC now, or a microsecond after the latest time known."""
        now = utc_now()
        self._last = now if self._last is None else max(now, self._last + _TICK)
        return self._last


def utc_now() -> datetime:
    """What the machine's clock says."""
    return datetime.now(UTC)
