"""A child process whose files may not grow: writes intents until the ledger cannot, then again once it can.

usage: python -m support.full_disk_ledger FOLDER. A limit on file size stands for a full disk, and needs no rights.
Prints one line of JSON for each state it saw.
"""

import asyncio
import json
import resource
import sys
from pathlib import Path

from support.ledger_records import intent, open_ledger, outcome

from broker.errors import Unavailable

LIMIT = 512 * 1024


def limit_files(size: int) -> None:
    """From now on no file of this process grows beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def tell(**seen: object) -> None:
    """One line of what was seen."""
    sys.stdout.write(json.dumps(seen) + "\n")


async def main(folder: Path) -> None:
    """See the module."""
    async with await open_ledger(folder) as ledger:
        limit_files(LIMIT)
        recorded = []
        failed: list[Unavailable] = []

        async def hammer(caller: int) -> None:
            number, in_a_row = 0, 0
            while in_a_row < 5:  # a first failure empties the WAL into the main file, which still has room
                try:
                    recorded.append(await ledger.record_intent(intent(f"{caller}-{number}")))
                    in_a_row = 0
                except Unavailable as error:
                    failed.append(error)
                    in_a_row += 1
                number += 1

        await asyncio.gather(*[hammer(caller) for caller in range(8)])
        ledger.append_later(outcome(recorded[-1]))
        again = 0
        for _ in range(5):
            try:
                await ledger.record_intent(intent())
            except Unavailable:
                again += 1
        tell(
            recorded=recorded,
            reasons=sorted({error.reason for error in failed}),
            health=ledger.health(),
            failed_again=again,
        )
        limit_files(resource.RLIM_INFINITY)
        seq = await ledger.record_intent(intent("after"))
        tell(after=seq, health=ledger.health())


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
