"""Who a peer is, and what it may do: principals, and the hook that decides about each push and pull."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lynxproto.manifest import FetchKey, Manifest
from lynxproto.transports.abc import Credentials

__all__ = ["Authorize", "Principal", "TransferRequest"]


@dataclass(frozen=True, slots=True)
class Principal:
    """A peer, as far as it has proved who it is."""

    address: str
    """Where it connects from, without its port: ``tcps://10.0.0.3``. Not proof of anything by itself."""
    certificate: tuple[str, ...] = ()
    """Names in its verified certificate: the first is its URI (SPIFFE), DNS name, e-mail address or common name."""
    secret: str = ""
    """Whose shared secret it knows: :attr:`lynxproto.config.Secret.owner`."""
    uid: int | None = None
    """User id of its process, as the kernel tells over a unix socket."""

    @property
    def name(self) -> str:
        """One text for logs, limits and rules: ``tls:NAME``, else ``secret:OWNER``, ``uid:N``, or ``anonymous``."""
        if self.certificate:
            return f"tls:{self.certificate[0]}"
        if self.secret:
            return f"secret:{self.secret}"
        return "anonymous" if self.uid is None else f"uid:{self.uid}"

    @property
    def key(self) -> str:
        """What limits count by: the name, or the address of who is anonymous."""
        return f"{self.name} at {self.address}" if self.name == "anonymous" else self.name

    @classmethod
    def of(cls, stream_name: str, credentials: Credentials, secret: str) -> Principal:
        """The principal at the other end of a byte stream whose peer knows ``secret``."""
        return cls(address_of(stream_name), credentials.names, secret, credentials.uid)


def address_of(stream_name: str) -> str:
    """A stream's peer address without its port: what limits per address count by."""
    head, _, port = stream_name.rpartition(":")
    return head if port.isdigit() else stream_name


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferRequest:
    """What a peer wants: to ``push`` the cache of ``manifest``, or to ``pull`` the one under ``key``."""

    action: Literal["push", "pull"]
    principal: Principal
    manifest: Manifest | None = None
    key: FetchKey | None = None


#: True lets the transfer happen; False, or raising a LynxError (whose text is told), refuses it with FORBIDDEN.
Authorize = Callable[[TransferRequest], bool]
