"""Writes what the campaigns saw, passed or not, where KDAD_SOAK_REPORT names a file."""

import os
import time
from pathlib import Path

import pytest

from kdad_dist.runtime import environment

HEAD = """# Soak

What `make soak` saw when it was run last; written by it, by nobody else.

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
    return head + "".join(map(section, reports))


def section(report: pytest.TestReport) -> str:
    name = report.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " ")
    lines = [
        f"\n## {name[0].upper()}{name[1:]}\n",
        f"- {report.outcome}, {minutes(report.duration)}",
    ]
    if report.skipped and isinstance(report.longrepr, tuple):
        lines.append(f"- {report.longrepr[2]}")
    lines += [f"- {key}: {value}" for key, value in report.user_properties]
    return "\n".join(lines) + "\n"


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
