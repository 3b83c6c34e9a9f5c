"""What an automatic policy needs to know of a session: its link and codecs measured, its transfers remembered."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from lynxproto.codecspeed import measure_codec
from lynxproto.errors import LocalError, LynxError
from lynxproto.linkpolicy import AutoPolicy, Choice, Chooser, CodecFigures, LinkMeter
from lynxproto.manifest import Manifest
from lynxproto.policy import Policy

if TYPE_CHECKING:
    from lynxproto._outgoing import Outgoing
    from lynxproto._peer import Peer

__all__ = ["LinkAware"]

_log = logging.getLogger("lynxproto")

#: To measure a link, so many bytes are sent at least and at most, and so many seconds that may take: less tells little.
_BYTES: Final = (64 << 10, 4 << 20)
_SECONDS: Final = (25e-3, 5.0)


class LinkAware:
    """One session's. Lives on the I/O thread."""

    def __init__(self, peer: Peer, policy: Policy | AutoPolicy | None) -> None:
        self.meter = LinkMeter()
        self._peer = peer
        self._auto = policy if isinstance(policy, AutoPolicy) else None
        self._chooser: Chooser | None = None
        self._answered: dict[int, float] = {}

    async def get_to_know(self) -> None:
        """For an automatic policy: measure the codecs (once in a process) and the link, unless that is done."""
        if self._auto is None or self._chooser is not None:
            return
        figures = await asyncio.to_thread(_measure_all, self._auto.candidates)
        threads = self._peer.workers.threads
        self._chooser = Chooser(self._auto, {name: figure.on_threads(threads) for name, figure in figures.items()})
        rate = await self._measure_link()
        if rate is not None:
            self._chooser.saw_link(rate, "measured at the start")

    async def _measure_link(self) -> float | None:
        """The link's goodput in bytes/s, by sending bytes that mean nothing; None if the link breaks meanwhile."""
        nbytes, size = 0, _BYTES[0]
        began = time.monotonic()
        try:
            async with asyncio.timeout(_SECONDS[1]):
                trip = await self._send_ballast(0)
                while True:
                    nbytes = size
                    began = time.monotonic()
                    seconds = max(await self._send_ballast(size) - trip, 1e-9)
                    if seconds >= _SECONDS[0]:
                        return size / seconds
                    if size >= _BYTES[1]:  # a fast link: what else the machine does must not make it look slow
                        again = [await self._send_ballast(size) - trip for _ in range(2)]
                        return size / max(min(seconds, *again), 1e-9)
                    size = min(4 * size, _BYTES[1])
        except TimeoutError:  # slower than that, then
            return nbytes / (time.monotonic() - began) if nbytes else None
        except LynxError as error:
            _log.info("the link to %s could not be measured: %s", self._peer.name, error)
            return None

    async def _send_ballast(self, nbytes: int) -> float:
        """How many seconds ``nbytes`` bytes take until the peer's answer is here."""
        peer = self._peer
        began = time.monotonic()
        ping = peer.connection.measure_link(nbytes, began)
        peer.pump()
        await peer.changed.until(lambda: ping in self._answered or peer.over)
        if peer.over:
            raise peer.error or LocalError("the session is over")
        return self._answered.pop(ping) - began

    def on_measured(self, ping: int) -> None:
        """The peer has answered."""
        self._answered[ping] = time.monotonic()
        self._peer.changed.notify()

    def choose(self, auto: AutoPolicy, manifest: Manifest) -> Choice:
        """A policy for this transfer. Raises :class:`~lynxproto.errors.LocalError` if ``auto`` is not the session's."""
        if self._chooser is None or auto is not self._auto:
            raise LocalError("an automatic policy must be the session's: connect(..., policy=Policy.auto())")
        if self.meter.bytes_per_second is not None:
            self._chooser.saw_link(self.meter.bytes_per_second, "measured on transfers")
        names = [name for name, policy in auto.candidates.items() if policy.supports(manifest)]
        if not names:
            raise LocalError(f"none of the policies {', '.join(auto.candidates)} can code this cache")
        return self._chooser.choose(manifest.nbytes, names)

    def learn(self, outgoing: Outgoing, seconds: float | None) -> None:
        """A transfer is complete; it took ``seconds`` on its own, if that is known."""
        self.meter.confirmed(outgoing.stats.bytes, time.monotonic())
        if self._chooser is not None and seconds is not None:
            self._chooser.took(outgoing.stats.policy, outgoing.manifest.nbytes, seconds)


def _measure_all(candidates: Mapping[str, Policy]) -> dict[str, CodecFigures]:
    return {name: measure_codec(policy.body) for name, policy in candidates.items()}
