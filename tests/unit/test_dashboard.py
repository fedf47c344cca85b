"""The Grafana dashboard: well formed as Grafana's own model of it says, laid out without overlaps."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

import expressions

GRID_COLUMNS = 24


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = expressions.dashboard()["panels"]
    return found


def test_nothing_in_it_is_unknown_to_grafanas_model() -> None:
    """Its model reads what it knows and drops the rest: a misspelt field does not come back."""
    written = expressions.dashboard()
    read = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(written)))
    assert not list(_lost(written, read, ""))


def test_ids_are_unique_and_panels_lie_in_the_grid_beside_each_other() -> None:
    assert len({panel["id"] for panel in panels()}) == len(panels())
    taken: dict[tuple[int, int], str] = {}
    for panel in panels():
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= GRID_COLUMNS, panel["title"]
        for place in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
            assert place not in taken, f"{panel['title']} lies over {taken[place]}"
            taken[place] = panel["title"]


def test_every_panel_with_figures_has_a_unit_and_asks_the_chosen_prometheus() -> None:
    for panel in panels():
        if panel["type"] == "row":
            continue
        source = {"type": "prometheus", "uid": "${datasource}"}
        assert panel["datasource"] == source
        assert [target["datasource"] for target in panel["targets"]] == [source] * len(panel["targets"])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        assert panel["type"] == "table" or panel["fieldConfig"]["defaults"]["unit"], panel["title"]


def test_the_provisioned_source_is_the_one_the_dashboard_begins_with() -> None:
    folder = expressions.FOLDER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())["datasources"]
    variables = {each["name"]: each for each in expressions.dashboard()["templating"]["list"]}
    assert variables["datasource"]["current"]["value"] == source["uid"]
    (provider,) = yaml.safe_load((folder / "dashboards" / "step-oracle.yml").read_text())["providers"]
    assert provider["options"]["path"] == "/etc/grafana/dashboards"


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ('sum by (job, tenant) (rate(a_total{x="b_total"}[5m])) / (b{c=~"d"} > 0)', {"a_total", "b"}),
        ("histogram_quantile(0.99, sum by (le) (rate(a_bucket[20s])))", {"a_bucket"}),
        ('(a{k="v"} unless a{k="v"} offset 10m) or increase(a[10m])', {"a"}),
        ("job:a:ratio_rate5m > 0.001 and up == 0", {"job:a:ratio_rate5m", "up"}),
        ("a_bytes / 2^30", {"a_bytes"}),
    ],
)
def test_the_metrics_of_an_expression_are_found(expression: str, names: set[str]) -> None:
    assert expressions.names_in(expression) == names


def _lost(written: Any, read: Any, where: str) -> Any:
    if isinstance(written, dict):
        for key, value in written.items():
            if not isinstance(read, dict) or key not in read:
                yield f"{where}/{key}"
            else:
                yield from _lost(value, read[key], f"{where}/{key}")
    elif isinstance(written, list):
        if not isinstance(read, list) or len(read) != len(written):
            yield where
        else:
            for i, (one, other) in enumerate(zip(written, read, strict=True)):
                yield from _lost(one, other, f"{where}/{i}")
    elif written != read:
        yield f"{where}: {written!r} became {read!r}"
