"""The detector of blocking calls that watches every test is itself awake."""

import time

import pytest
from blockbuster import BlockingError

from clarion.durations import parse_duration
from clarion.loops import run_forever


async def test_a_blocking_call_in_our_code_is_detected() -> None:
    async def step() -> float:
        time.sleep(0.001)  # noqa: ASYNC251  the point of this test
        return parse_duration("1s", max_seconds=1)

    with pytest.raises(BlockingError):
        await run_forever(step, name="blocking")
