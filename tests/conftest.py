"""Settings of all tests."""

from hypothesis import settings

# How long an example takes says more about the machine than about the code: pytest's own timeout catches what hangs.
settings.register_profile("lynxproto", deadline=None)
settings.load_profile("lynxproto")
