"""Settings of all tests."""

import logging
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

# How long an example takes says more about the machine than about the code: pytest's own timeout catches what hangs.
settings.register_profile("lynxproto", deadline=None)
settings.load_profile("lynxproto")

# A shell starts what it runs in the background with SIGINT ignored, nohup with SIGHUP; commands that tests interrupt
# would inherit that.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """Commands set up the library's log; the next test finds it as it was."""
    logger = logging.getLogger("lynxproto")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before
