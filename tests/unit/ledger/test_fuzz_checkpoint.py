"""The fuzz target of checkpoints, briefly, so that it cannot rot."""

from fuzz import fuzz_checkpoint
from hypothesis import given
from hypothesis import strategies as st


@given(st.binary(max_size=300) | st.text("0123456789+/=\n —Z", max_size=80).map(str.encode))
def test_no_bytes_are_taken_for_what_was_signed(data: bytes) -> None:
    fuzz_checkpoint.one_input(data)
