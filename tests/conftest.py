"""What all tests share: which of them run here, and that none leaves the network or another test's settings behind."""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--real", action="store_true", help="what cannot run is an error, not left out")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what needs root where we are not root, and says so; with --real that ends the run."""
    if os.geteuid() == 0:
        return
    left_out = [item for item in items if item.get_closest_marker("root")]
    if not left_out:
        return
    if config.getoption("--real"):
        raise pytest.UsageError(f"{len(left_out)} tests need root, and with --real nothing is left out")
    items[:] = [item for item in items if not item.get_closest_marker("root")]
    config.hook.pytest_deselected(items=left_out)
