"""Who may come in, and how much each peer may hold: counting, without I/O; the time is an argument.

A byte stream is a *guest*: at the door until its peer has proved who it is, then inside until it ends. At the door
room is short and fair: when it is full, the oldest guest of the address that has most there must go, so that a flood
pushes out itself first.
"""

from __future__ import annotations

import ipaddress
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Final

from lynxproto.config import Admission
from lynxproto.errors import LimitError
from lynxproto.windows import Budget

__all__ = ["Gate", "Guest", "neighbourhood"]

#: Addresses whose rate is remembered; of more than that the longest silent are forgotten.
_ADDRESSES: Final = 4096


def neighbourhood(address: str) -> str:
    """What limits per address count by: an IPv6 host may have all of its /64, so that counts as one."""
    scheme, _, host = address.partition("://[")
    try:
        parsed = ipaddress.IPv6Address(host.rstrip("]").partition("%")[0])
    except ValueError:
        return address
    if parsed.ipv4_mapped is not None:
        return f"{scheme}://{parsed.ipv4_mapped}"
    return f"{scheme}://[{ipaddress.IPv6Network((parsed, 64), strict=False)}]"


class Guest:
    """A byte stream. ``evict`` is called to close it when its room at the door is needed."""

    __slots__ = ("address", "evict", "principal")

    def __init__(self, address: str, evict: Callable[[], object]) -> None:
        self.address = address
        self.evict = evict
        self.principal: str | None = None


class Gate:
    """Keeps a listener to its :class:`~lynxproto.config.Admission`."""

    def __init__(self, limits: Admission) -> None:
        self.limits = limits
        self._door: dict[str, OrderedDict[Guest, None]] = {}
        self._waiting = 0
        self._accepts: OrderedDict[str, Budget] = OrderedDict()
        self._inside: Counter[str] = Counter()  # guests by address
        self._connections: Counter[str] = Counter()  # guests by principal
        self._sessions: Counter[str] = Counter()
        self._transfers: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._budgets: dict[str, tuple[Budget, Budget]] = {}

    @property
    def handshakes(self) -> int:
        """Guests at the door."""
        return self._waiting

    @property
    def connections(self) -> int:
        """Guests inside."""
        return self._connections.total()

    def knock(self, address: str, now: float, evict: Callable[[], object]) -> Guest:
        """A byte stream was accepted. Raises :class:`~lynxproto.errors.LimitError` if it must be closed at once."""
        limits = self.limits
        budget = self._accepts.get(address)
        if budget is None:
            budget = self._accepts[address] = Budget(limits.accepts_per_address, limits.accepts_per_address)
            if len(self._accepts) > _ADDRESSES:
                self._accepts.popitem(last=False)
        self._accepts.move_to_end(address)
        if not budget.spend(1, now):
            raise LimitError(f"more than {limits.accepts_per_address:g} connections a second from {address}; wait")
        if self._inside[address] >= limits.connections_per_address:
            raise LimitError(f"{limits.connections_per_address} connections from {address}; close some")
        if self.connections >= limits.connections:
            raise LimitError(f"{limits.connections} connections are open, the most that this side takes; try later")
        if len(self._door.get(address, ())) >= limits.handshakes_per_address:
            self._make_room(address)
        elif self._waiting >= limits.handshakes:
            self._make_room(max(self._door, key=lambda known: len(self._door[known])))
        guest = Guest(address, evict)
        self._door.setdefault(address, OrderedDict())[guest] = None
        self._waiting += 1
        return guest

    def _make_room(self, address: str) -> None:
        oldest = next(iter(self._door[address]))
        self.leave(oldest)
        oldest.evict()

    def enter(self, guest: Guest, principal: str) -> None:
        """The peer proved who it is. Raises :class:`~lynxproto.errors.LimitError` if it has too many connections."""
        self._leave_door(guest)
        if self._connections[principal] >= self.limits.connections_per_principal:
            raise LimitError(f"{self.limits.connections_per_principal} connections of {principal}; close some")
        guest.principal = principal
        self._connections[principal] += 1
        self._inside[guest.address] += 1

    def leave(self, guest: Guest) -> None:
        """The byte stream is closed. Idempotent."""
        self._leave_door(guest)
        if guest.principal is not None:
            _less(self._connections, guest.principal)
            _less(self._inside, guest.address)
            self._forget(guest.principal)
            guest.principal = None

    def _leave_door(self, guest: Guest) -> None:
        waiting = self._door.get(guest.address)
        if waiting is not None and guest in waiting:
            del waiting[guest]
            self._waiting -= 1
            if not waiting:
                del self._door[guest.address]

    def open_session(self, principal: str) -> tuple[Budget, Budget]:
        """A session begins; returns the budgets for control frames and their bytes that the principal's sessions share.

        Raises :class:`~lynxproto.errors.LimitError`.
        """
        if self._sessions[principal] >= self.limits.sessions_per_principal:
            raise LimitError(f"{self.limits.sessions_per_principal} sessions of {principal}; close some")
        self._sessions[principal] += 1
        rates = (self.limits.control_frames_per_principal, self.limits.control_bytes_per_principal)
        return self._budgets.setdefault(principal, (Budget(rates[0]), Budget(rates[1])))

    def close_session(self, principal: str) -> None:
        """A session that was opened is over."""
        _less(self._sessions, principal)
        self._forget(principal)

    def _forget(self, principal: str) -> None:
        if principal not in self._sessions and principal not in self._connections:
            self._budgets.pop(principal, None)

    def open_transfer(self, principal: str, nbytes: int) -> None:
        """A peer offers a cache of ``nbytes``. Raises :class:`~lynxproto.errors.LimitError`: nothing was counted."""
        limits = self.limits
        if self._transfers[principal] >= limits.transfers_per_principal:
            raise LimitError(f"{limits.transfers_per_principal} transfers of {principal} are open; wait for some")
        if self._bytes[principal] + nbytes > limits.bytes_per_principal:
            raise LimitError(
                f"{nbytes} bytes, and {self._bytes[principal]} that {principal} holds already, are more than "
                f"{limits.bytes_per_principal}; wait for other transfers, or raise admission.bytes_per_principal"
            )
        self._transfers[principal] += 1
        self._bytes[principal] += nbytes

    def close_transfer(self, principal: str, nbytes: int) -> None:
        """A transfer that was opened is over."""
        _less(self._transfers, principal)
        _less(self._bytes, principal, nbytes)


def _less(counter: Counter[str], key: str, amount: int = 1) -> None:
    """Subtract, and keep no zeros: strangers come and go under many names."""
    counter[key] -= amount
    if counter[key] <= 0:
        del counter[key]
