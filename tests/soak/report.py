"""Writes what the campaigns saw, passed or not, where KDAD_SOAK_REPORT names a file."""

import os
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from kdad_dist.runtime import environment

HEAD = """# Soak

What `make soak` saw when it was run last, written by it. Where it was told to run a part
(`PYTEST_FLAGS`), or interrupted, what it did run stands here alone.

{date}, commit {commit}, {took} altogether. {cpu}, {cores} cores, {gpu}; Python {python},
torch {torch}. {passed} of {all} campaigns passed.
"""
REPORTS: list[pytest.TestReport] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "soak" in report.keywords and (report.when == "call" or not report.passed):
        REPORTS.append(report)


def pytest_sessionfinish() -> None:
    path = os.environ.get("KDAD_SOAK_REPORT")
    if path and REPORTS:
        Path(path).write_text(text(REPORTS), encoding="utf-8")


def text(reports: list[pytest.TestReport]) -> str:
    facts = environment.describe()
    head = HEAD.format(
        **facts | {"gpu": facts["gpu"] or "no GPU"},
        date=time.strftime("%Y-%m-%d"),
        took=minutes(sum(report.duration for report in reports)),
        passed=sum(report.passed for report in reports),
        all=len(reports),
    )
    told = [report for report in reports if report.user_properties]
    return head + "".join(map(section, told)) + table([r for r in reports if r not in told])


def section(report: pytest.TestReport) -> str:
    lines = [f"\n## {words(report)}\n", f"- {report.outcome}, {minutes(report.duration)}"]
    lines += [f"- {key}: {value}" for key, value in report.user_properties]
    return "\n".join(lines) + "\n"


def table(reports: list[pytest.TestReport]) -> str:
    """One line for each test, however many cases it has."""
    cases: defaultdict[str, list[pytest.TestReport]] = defaultdict(list)
    for report in reports:
        cases[words(report)].append(report)
    lines = [
        "",
        "## Everything else",
        "",
        "| claim | cases | outcome | took |",
        "|---|---|---|---|",
    ]
    for claim, found in cases.items():
        outcomes = Counter(report.outcome for report in found)
        outcome = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))
        took = minutes(sum(report.duration for report in found))
        lines.append(f"| {claim} | {len(found)} | {outcome} | {took} |")
    return "\n".join(lines) + "\n" if reports else ""


def words(report: pytest.TestReport) -> str:
    """What a test claims, from its name."""
    name = report.nodeid.rpartition("::")[2].partition("[")[0]
    return name.removeprefix("test_").replace("_", " ").capitalize()


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
