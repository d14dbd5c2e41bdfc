"""The declarations, and what travels to the actor. No Ray here."""

import re

from cluster import metrics
from cluster.metrics import METRICS, Increments, Snapshot


def test_names_are_what_prometheus_and_ray_take():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert re.fullmatch(r"bitatlas_[a-z_]+", metric.name)
        assert not metric.name.endswith(("_total", "_bucket", "_count", "_sum")), "Ray adds these"
        assert metric.tags[0] == "sweep"
        assert metric.description.endswith(".")
        assert (metric.kind == "histogram") == bool(metric.boundaries)
        assert list(metric.boundaries) == sorted(metric.boundaries)


def test_names_at_the_endpoint():
    exported = {metric.name: metric.exported for metric in METRICS}
    assert exported["bitatlas_jobs"] == ("ray_bitatlas_jobs",)
    assert exported["bitatlas_retries"] == ("ray_bitatlas_retries_total",)
    assert exported["bitatlas_stage_seconds"] == (
        "ray_bitatlas_stage_seconds_bucket",
        "ray_bitatlas_stage_seconds_count",
        "ray_bitatlas_stage_seconds_sum",
    )


def test_counters_are_told_by_what_they_grew():
    increments = Increments()

    def grown(**counts):
        series = {("s", kind): count for kind, count in counts.items()}
        return list(increments.of(Snapshot(counters={"bitatlas_retries": series})))

    assert grown(error=0.0) == []
    assert grown(error=2.0) == [("bitatlas_retries", ("s", "error"), 2.0)]
    assert grown(error=2.0) == []
    # A snapshot in between was lost: nothing is.
    assert grown(error=5.0, disk=1.0) == [
        ("bitatlas_retries", ("s", "error"), 3.0),
        ("bitatlas_retries", ("s", "disk"), 1.0),
    ]


def test_what_was_not_sent_is_not_lost(monkeypatch):
    seconds = "bitatlas_stage_seconds"
    unsent = Snapshot(gauges={"bitatlas_workers": {("s",): 1}}, observed={seconds: [(("s", "a"), 1.0)]})
    new = Snapshot(gauges={"bitatlas_workers": {("s",): 2}}, observed={seconds: [(("s", "a"), 2.0)]})
    both = new.after(unsent)
    assert both.observed == {seconds: [(("s", "a"), 1.0), (("s", "a"), 2.0)]}
    assert both.gauges == new.gauges
    assert Snapshot().after(both).observed == both.observed
    monkeypatch.setattr(metrics, "MAX_OBSERVED", 1)
    assert new.after(unsent).observed == new.observed
