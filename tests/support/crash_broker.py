"""Starts brokers quickly, to be killed: everything is loaded once, and each broker is a fork of this process.

usage: python -m support.crash_broker CONFIG. "start" starts one and answers its PID, "kill" ends it by SIGKILL, "stop"
by SIGTERM; both answer how it ended. gRPC allows the fork because nothing of it was used here yet.
"""

import asyncio
import ctypes
import os
import signal
import sys
from pathlib import Path

import uvloop

from broker.cli.config import load
from broker.cli.log import configure_log
from broker.cli.serve import serve

PR_SET_PDEATHSIG = 1
LOG = "broker.log"


def run(config: Path) -> None:
    """A broker, in the child. It does not outlive its parent."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    log = os.open(config.parent / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor, place in ((null, 0), (null, 1), (log, 2)):
        os.dup2(descriptor, place)
    configure_log("warning", as_json=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(load(config)))


def start(config: Path) -> int:
    """Its PID."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        run(config)
        status = 0
    finally:
        os._exit(status)


def main(config: Path) -> None:
    """Follows commands until there are no more."""
    pid = 0
    for line in sys.stdin:
        match line.strip():
            case "start":
                pid = start(config)
                answer = pid
            case "kill" | "stop" as how:
                os.kill(pid, signal.SIGKILL if how == "kill" else signal.SIGTERM)
                answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            case other:
                raise ValueError(other)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
