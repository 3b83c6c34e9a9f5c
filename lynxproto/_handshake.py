"""The handshake of a byte stream: HELLO and HELLO_ACK, who knows the secret, which session a stream makes or joins.

Frames to send are queued on the stripe. What becomes of one that fails, and of the session, the connection decides.
"""

from __future__ import annotations

import hmac

from lynxproto import _cbor, frames
from lynxproto._context import Context
from lynxproto._stripe import Stripe
from lynxproto.config import Secret
from lynxproto.digest import crc32c
from lynxproto.errors import (
    AuthenticationError,
    CorruptFrameError,
    ErrorCode,
    ExpiredSecretError,
    LimitError,
    PeerError,
    ProtocolError,
    RemoteError,
    VersionError,
)
from lynxproto.frames import HEADER_SIZE, MAX_HELLO, VERSION, FrameType, Header
from lynxproto.state import STRIPE, StripeState, advance

__all__ = ["Handshake", "PeerRefusal", "as_refusal", "hello_session"]


def hello_session(data: bytes | bytearray | memoryview) -> bytes | None:
    """For a listener: which session the first bytes of a new byte stream ask for.

    Returns None while ``data`` is too short to tell, ``b""`` for a new session (make a new Connection), or the
    16-byte id of the session to join (find the Connection by ``Connection.session``; refuse if there is none).
    Then call ``open_stripe`` and feed the same bytes to ``receive_data``. Joining is authenticated there.

    Raises :class:`~lynxproto.errors.ProtocolError` for anything that is not a HELLO of at most 16 KiB.
    """
    if len(data) < HEADER_SIZE:
        return None
    header = Header.unpack(memoryview(data)[:HEADER_SIZE])
    if header.type != FrameType.HELLO or header.payload_length > MAX_HELLO or header.extension_length:
        raise ProtocolError("the first frame is not a HELLO of at most 16 KiB")
    payload = memoryview(data)[HEADER_SIZE : HEADER_SIZE + header.payload_length]
    if payload.nbytes < header.payload_length:
        return None
    if crc32c(payload) != header.payload_crc:
        raise CorruptFrameError("HELLO: payload CRC32C is wrong")
    session = _cbor.loads(payload, "HELLO").data("session", 0, 16)
    if len(session) not in (0, 16):
        raise ProtocolError("HELLO: a session id has 16 bytes")
    return bytes(session)


class PeerRefusal(ProtocolError):
    """ERROR or GOAWAY in a handshake."""


def as_refusal(error: ProtocolError) -> RemoteError:
    """A refusal as the shell sees it: the class that the peer's code stands for."""
    for kind in (AuthenticationError, ExpiredSecretError, VersionError, LimitError):
        if error.code is kind.code:
            return kind(str(error))
    return PeerError(str(error), error.code)


class Handshake:
    """All handshakes of one side of a session. ``unix_offset`` is Unix time minus the context's."""

    def __init__(self, ctx: Context, *, client: bool, unix_offset: float) -> None:
        self.ctx = ctx
        self.client = client
        self.session: bytes | None = None
        """Its id, 16 bytes; None until the first stripe made it."""
        self.principal = ""
        """Whose secret the peer proved to know."""
        self._token = b""  # what a stripe that joins has to know
        self._unix_offset = unix_offset

    def forget(self) -> None:
        """The session is gone: the next stripe makes another."""
        self.session, self._token = None, b""

    def greet(self, stripe: Stripe, alive: tuple[int, ...]) -> None:
        """The client's HELLO; ``alive`` are the numbers of its stripes.

        Raises :class:`~lynxproto.errors.ExpiredSecretError` if it has secrets and none is valid now.
        """
        stripe.secret = self._valid_secret()
        self._say_hello(stripe, alive=alive)

    def receive(self, stripe: Stripe, body: frames.Body, payload: bytes) -> frames.Hello | None:
        """A frame of the handshake arrived; the peer's HELLO once it is over.

        Raises :class:`~lynxproto.errors.ProtocolError` and its kinds for whatever else the peer says.
        """
        if isinstance(body, frames.Error | frames.GoAway):
            raise PeerRefusal(f"the peer refused the handshake: {body.text or body.code.name}", body.code)
        if isinstance(body, frames.Hello) and stripe.state is StripeState.HELLO:
            stripe.hello, stripe.peer_hello = body, payload
            low, high = body.versions
            if not low <= VERSION <= high:
                raise VersionError(
                    f"the peer speaks versions {low} to {high}, this side {VERSION}; install the same lynxproto on both"
                )
            if self.client:
                self._on_server_hello(stripe, body)
            else:
                self._on_client_hello(stripe, body)
            stripe.state = advance(STRIPE, stripe.state, "hello")
            return None
        if isinstance(body, frames.HelloAck) and stripe.state is StripeState.PROOF:
            stripe.peer_proof = payload
            return self._on_proof(stripe, body)
        text = f"{type(body).__name__} in state {stripe.state.value!r} of the handshake"
        raise ProtocolError(text, ErrorCode.STATE)

    def _valid_secret(self) -> Secret | None:
        """The client's secret: the first that is valid now; None if there are none."""
        expired: ExpiredSecretError | None = None
        for secret in self.ctx.config.accepted_secrets:
            try:
                secret.check(self.ctx.now + self._unix_offset)
            except ExpiredSecretError as error:
                expired = expired or error
            else:
                return secret
        if expired is not None:
            raise expired
        return None

    def _named_secret(self, name: str) -> Secret | None:
        """The server's secret that the client means. Raises :class:`~lynxproto.errors.AuthenticationError`."""
        secrets = self.ctx.config.accepted_secrets
        for secret in secrets:
            if secret.id == name:
                secret.check(self.ctx.now + self._unix_offset)
                return secret
        if secrets or name:
            what = f"the secret {name!r} is" if name else "a secret without an id is"
            raise AuthenticationError(
                f"{what} not accepted here; both sides need the same one (--secret-file, Config.secrets)"
            )
        return None

    def _say_hello(self, stripe: Stripe, *, token: bytes = b"", alive: tuple[int, ...] = ()) -> None:
        config = self.ctx.config
        hello = frames.Hello(
            versions=(VERSION, VERSION),
            nonce=self.ctx.random.randbytes(32),
            stripe=stripe.number,
            name=config.name,
            lease=config.lease,
            limits=config.limits,
            codecs=config.codecs,
            features=config.features,
            session=self.session or b"",
            token=token,
            alive=alive,
            secret=stripe.secret.id if self.client and stripe.secret else "",
        )
        frame = self.ctx.encode(hello)
        stripe.my_hello = frame[HEADER_SIZE:]
        stripe.control.append(frame)

    def _proof(self, stripe: Stripe, *, of_client: bool) -> bytes:
        """HMAC-SHA256 (RFC 2104) over both HELLOs, keyed by the shared secret and, when joining, the join token."""
        token = self._token if stripe.joins else b""
        key = hmac.digest(stripe.secret.key if stripe.secret else b"", b"lynxproto 1 key" + token, "sha256")
        assert stripe.peer_hello is not None
        mine, theirs = stripe.my_hello, stripe.peer_hello
        client, server = (mine, theirs) if self.client else (theirs, mine)
        role = b"lynxproto 1 client" if of_client else b"lynxproto 1 server"
        return hmac.digest(key, role + len(client).to_bytes(4, "little") + client + server, "sha256")

    def _on_server_hello(self, stripe: Stripe, hello: frames.Hello) -> None:
        stripe.joins = self.session is not None
        if hello.stripe != stripe.number or len(hello.session) != 16:
            raise ProtocolError("HELLO: the server answered for another stripe, or without a session")
        if stripe.joins and hello.session != self.session:
            raise ProtocolError("HELLO: the server answered for another session")
        if not stripe.joins and len(hello.token) != 32:
            raise ProtocolError("HELLO: the server gave no join token")

    def _on_client_hello(self, stripe: Stripe, hello: frames.Hello) -> None:
        stripe.secret = self._named_secret(hello.secret)
        stripe.joins = bool(hello.session)
        if stripe.joins and hello.session != self.session:
            raise ProtocolError("no such session here: it timed out, or this side was restarted", ErrorCode.NOT_FOUND)
        if not stripe.joins:
            if self.session is not None:
                raise ProtocolError("a HELLO for a new session on an existing one", ErrorCode.STATE)
            self.session = self.ctx.random.randbytes(16)
            self._token = self.ctx.random.randbytes(32)
        stripe.number = hello.stripe
        self._say_hello(stripe, token=b"" if stripe.joins else self._token)
        proof = self._proof(stripe, of_client=False)
        stripe.control.append(self.ctx.encode(frames.HelloAck(version=VERSION, mac=proof)))

    def _on_proof(self, stripe: Stripe, body: frames.HelloAck) -> frames.Hello:
        hello = stripe.hello
        assert hello is not None
        if body.version != VERSION:
            raise VersionError(f"the peer chose version {body.version}, this side speaks {VERSION}")
        if not hmac.compare_digest(body.mac, self._proof(stripe, of_client=not self.client)):
            raise AuthenticationError(
                "the peer did not prove that it knows the secret; both sides need the same one "
                "(--secret-file, Config.secret)"
            )
        principal = stripe.secret.owner if stripe.secret else ""
        if not stripe.joins:
            self.principal = principal
        elif not self.client and principal != self.principal:
            raise AuthenticationError(f"the session belongs to {self.principal!r}, this stripe to {principal!r}")
        if self.client:
            proof = self._proof(stripe, of_client=True)
            stripe.control.append(self.ctx.encode(frames.HelloAck(version=VERSION, mac=proof)))
            if not stripe.joins:
                self.session, self._token = hello.session, hello.token
        return hello
