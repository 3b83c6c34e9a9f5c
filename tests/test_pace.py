"""How much a byte stream takes at once follows the link, not what there is to send."""

from __future__ import annotations

import pytest

from lynxproto._pace import Pace

KIB = 1 << 10


def busy(pace: Pace, now: float, rate: float, seconds: float) -> float:
    """Send without a break over a link of ``rate`` bytes a second; when that ended."""
    end = now + seconds
    while now < end:
        nbytes = pace.limit
        now += nbytes / rate
        pace.sent(nbytes, now)
    return now


@pytest.mark.parametrize("rate", [1e6, 125e6, 3e9])
def test_the_limit_is_what_the_link_carries_in_a_millisecond(rate: float) -> None:
    pace = Pace()
    busy(pace, 0.0, rate, 0.5)
    assert pace.rate == pytest.approx(rate, rel=0.01)
    assert pace.limit == pytest.approx(min(max(rate * 1e-3, 16 * KIB), 4 << 20), rel=0.01)


def test_waiting_for_something_to_send_does_not_make_the_link_slow() -> None:
    """A few frames every 20 ms, as short prompts make them: the limit stays what the link carries."""
    pace = Pace()
    now, rate = 0.0, 2e9
    for _ in range(200):
        for _ in range(4):
            now += 64 * KIB / rate
            pace.sent(64 * KIB, now)
        pace.idle()
        now += 20e-3
    assert pace.rate == pytest.approx(rate, rel=0.01)


def test_a_first_send_finds_room_in_a_buffer_and_does_not_make_the_link_fast() -> None:
    pace = Pace()
    now = 0.0
    for _ in range(1000):
        now += 20e-6  # into an empty buffer
        pace.sent(64 * KIB, now)
        pace.idle()
        now += 1e-3
    assert pace.rate is None


def test_bursts_that_fit_into_buffers_do_not_hide_a_slow_link() -> None:
    """A stream that knows what its link carries is believed, as soon as it knows."""
    pace = Pace()
    now = 0.0
    for n in range(400):
        for _ in range(4):
            now += 64 * KIB / 5e9  # into the kernel's buffers
            pace.sent(64 * KIB, now, 0.0 if n < 200 else 10e6)
        assert pace.limit <= 128 * KIB
        pace.idle()
        now += 20e-3
    assert pace.rate == pytest.approx(10e6)
    assert pace.limit == pytest.approx(20e3, rel=0.01)


def test_the_limit_follows_a_link_that_becomes_slow() -> None:
    pace = Pace()
    now = busy(pace, 0.0, 3e9, 0.1)
    fast = pace.limit
    now = busy(pace, now, 20e6, 0.2)
    assert pace.limit == pytest.approx(20e3, rel=0.01)
    assert fast == pytest.approx(3e6, rel=0.01)
