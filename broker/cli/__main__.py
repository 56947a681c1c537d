"""`python -m broker.cli`: the command where it is not on PATH."""

from broker.cli.main import main

main()
