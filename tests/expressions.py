"""Every PromQL expression of deploy/observability: of the rules, the alerts and the dashboard."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml  # type: ignore[import-untyped]

from environments import REPOSITORY

FOLDER = REPOSITORY / "deploy" / "observability"
DASHBOARD = FOLDER / "grafana" / "dashboards" / "step-oracle.json"
RULES = tuple(FOLDER / "rules" / name for name in ("recording.yml", "alerts.yml"))
RULE_TESTS = FOLDER / "rules" / "alerts.test.yml"

# What Grafana puts in for its variables, all of each chosen.
_VARIABLES = {"$job": ".*", "$tenant": ".*", "$experiment": ".*", "$__rate_interval": "20s"}
_NOT_A_NAME = re.compile(r'"(?:[^"\\]|\\.)*"|\[[^\]]*\]|\b(?:by|without|on|ignoring)\s*\([^)]*\)|\{|\}')
_NAME = re.compile(r"(?<![\w:.])[a-zA-Z_:][\w:]*(?!\s*\(|[\w:])")
_WORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan", "m", "s"}


def dashboard() -> dict[str, Any]:
    """The dashboard as it is provisioned."""
    document: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return document


def rules() -> Iterator[dict[str, Any]]:
    """Every recording and alerting rule."""
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from group["rules"]


def of_rules() -> dict[str, str]:
    """Expressions by the name of their alert or record."""
    return {rule.get("alert") or rule["record"]: rule["expr"] for rule in rules()}


def of_dashboard() -> dict[str, str]:
    """Expressions by panel, with the dashboard's variables filled in."""
    document = dashboard()
    found = {f"annotation {each['name']}": each["expr"] for each in document["annotations"]["list"]}
    for panel in document["panels"]:
        for target in panel.get("targets", ()):
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    return {where: _fill(expression) for where, expression in found.items()}


def names_in(expression: str) -> set[str]:
    """The metrics an expression reads."""
    # Selectors hold label names and strings only, once their metric stands before them.
    without = re.sub(r"\{[^{}]*\}", "", re.sub(r'"(?:[^"\\]|\\.)*"', '""', expression))
    return {name for name in _NAME.findall(_NOT_A_NAME.sub(" ", without)) if name.lower() not in _WORDS}


def _fill(expression: str) -> str:
    for name, text in _VARIABLES.items():
        expression = expression.replace(name, text)
    return expression
