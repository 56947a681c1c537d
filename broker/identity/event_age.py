"""How old a security event may be. Apart, so that the ledger, which remembers them for as long, loads no verifier."""

from datetime import timedelta
from typing import Final

EVENT_AGE: Final = timedelta(hours=1)
"""One that was issued longer ago is not taken: transmitters that could not deliver it have tried again since."""
EVENT_AHEAD: Final = timedelta(seconds=5)
"""Clocks of two machines that run NTP differ by well under this."""
