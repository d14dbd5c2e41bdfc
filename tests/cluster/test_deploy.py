"""The Grafana dashboard asks for nothing but what is exported."""

import json
import re
from pathlib import Path

import pytest
import yaml

import cluster
from cluster.metrics import METRICS

DEPLOY = Path(cluster.__file__).parent / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "bitatlas.json").read_text(encoding="utf-8"))
EXPRESSIONS = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
QUERIES = [item["definition"] for item in DASHBOARD["templating"]["list"] if item["type"] == "query"]
LABELS = {series: {*metric.tags, "le"} for metric in METRICS for series in metric.exported}


def names(expression):
    return set(re.findall(r"ray_\w+", expression))


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS)
def test_an_expression_names_exported_metrics_and_their_tags(title, expression):
    (series,) = names(expression)
    assert series in LABELS
    chosen = re.findall(r"(\w+)=~", expression)
    grouped = [label.strip() for labels in re.findall(r"by \(([^)]*)\)", expression) for label in labels.split(",")]
    assert {"sweep"} <= set(chosen)
    assert {*chosen, *grouped} <= LABELS[series]
    assert ("le" in grouped) == series.endswith("_bucket")
    assert ("rate(" in expression or "increase(" in expression) <= series.endswith(("_total", "_count", "_bucket"))


@pytest.mark.parametrize("query", QUERIES)
def test_a_variable_s_query_does_too(query):
    series, label = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", query).groups()
    assert label in LABELS[series]


def test_every_metric_is_shown():
    shown = {name for _, expression in EXPRESSIONS for name in names(expression)}
    assert [metric.name for metric in METRICS if not shown & set(metric.exported)] == []


def test_panels_do_not_overlap():
    taken = {}
    for panel in DASHBOARD["panels"]:
        box = panel["gridPos"]
        for x in range(box["x"], box["x"] + box["w"]):
            for y in range(box["y"], box["y"] + box["h"]):
                assert (x, y) not in taken, (panel["title"], taken[x, y])
                taken[x, y] = panel["title"]
        assert box["x"] + box["w"] <= 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_prometheus_asks_where_ray_says():
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    document = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = document["scrape_configs"]
    (file,) = job["file_sd_configs"][0]["files"]
    assert file == f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"
