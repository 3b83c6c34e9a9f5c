"""The frame inspector: what is on the wire, from a capture, a pcap, a pipe or a live tap, frame by frame.

Nothing here needs a valid session: frames are shown up to a fault, with its offset and its reason, and from the next
intact header on. ``lynxproto inspect`` is this package's command line; docs/inspect.md shows it.
"""

from __future__ import annotations

from lynxproto.inspect.model import Fault, Frame, Gap, Segment, StripeEnd
from lynxproto.inspect.reader import Inspector

__all__ = ["Fault", "Frame", "Gap", "Inspector", "Segment", "StripeEnd"]
