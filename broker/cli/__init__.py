"""Commands and wiring: the only room that knows all the others."""

from broker.cli.main import main

__all__ = ["main"]
