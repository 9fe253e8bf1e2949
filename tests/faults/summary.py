"""Counts the faults that the tests inject, and says at the end how many there were.

A plugin of pytest (``-p tests.faults.summary``), so that it is also there in the process that
prints: with xdist the tests run in others.
"""

from collections import Counter

import pytest

FAULTS: Counter[str] = Counter()
"""By kind, of this process and of those that have reported to it."""

KEY = "faults_injected"


def count(kind: str) -> None:
    FAULTS[kind] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:  # one of xdist's processes
        output[KEY] = dict(FAULTS)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    FAULTS.update(getattr(node, "workeroutput", {}).get(KEY, {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FAULTS:
        kinds = ", ".join(f"{kind} {number}" for kind, number in FAULTS.most_common())
        terminalreporter.write_line(f"faults injected: {FAULTS.total()} ({kinds})")
