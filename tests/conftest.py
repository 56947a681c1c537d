"""What all tests share: which of them run here, and that none leaves the network or another test's settings behind."""

import os
import signal
from pathlib import Path

import pytest
from tools import parts

HERE = Path(__file__).parent


def pytest_configure() -> None:
    """What a test interrupts must hear of it: a shell's background job ignores SIGINT, and so do its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--real", action="store_true", help="what cannot run is an error, not left out")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what needs root where we are not root, or a part that is not here, and says so.

    With --real the first ends the run, and for the second the tests bring their part, or fail.
    """
    real = config.getoption("--real")
    if not real:
        _leave_out(config, items, {"softhsm", "cosign"} - parts.here())
    if os.geteuid() != 0 and (left_out := _leave_out(config, items, {"root"})) and real:
        raise pytest.UsageError(f"{left_out} tests need root, and with --real nothing is left out")


def _leave_out(config: pytest.Config, items: list[pytest.Item], markers: set[str]) -> int:
    """How many there were with one of them."""
    left_out = [item for item in items if any(map(item.get_closest_marker, markers))]
    if left_out:
        items[:] = [item for item in items if not any(map(item.get_closest_marker, markers))]
        config.hook.pytest_deselected(items=left_out)
    return len(left_out)
