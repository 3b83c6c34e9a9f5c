"""What is compared: lynxproto's codecs, and other people's where they are installed.

Each peer is configured as its makers would: one thread, bfloat16 mode where there is one, the setting that suits KV
words best among those that were tried (docs in each class). All see the same chunks, about the size each likes best.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lynxproto.chunk import ChunkSpec
from lynxproto.codecs import Codec, codec_ids, get_codec
from lynxproto.errors import ConfigError

__all__ = ["PEERS", "PRESETS", "UNIFORM", "Contestant", "Ours", "Peer", "Skipped", "ZipNN", "own_names", "select"]

#: Presets of the hq codec, in the order in which they are shown.
PRESETS = ("fast", "balanced", "dense")
#: Its anchors of one width for all key channels, which need no calibration.
UNIFORM = ('{"id": "hq", "key_bits": 4, "value_bits": 3}',)


class NotInstalled(Exception):
    """A peer's package is absent; the message is the package's name."""


class Contestant(ABC):
    """A codec under test. ``levels`` payloads a chunk; ``timed`` is False where only the ratio means anything."""

    codec: str
    preset: str | None = None
    #: What was configured, for the report.
    config: str = ""
    version: str = ""
    levels: int = 1
    exact: bool = True
    timed: bool = True
    #: Whether several threads may use it at once.
    threaded: bool = False

    @property
    def label(self) -> str:
        """Codec and preset, as shown."""
        return f"{self.codec} {self.preset}" if self.preset else self.codec

    def supports(self, spec: ChunkSpec) -> bool:
        """Whether such chunks can be encoded."""
        return True

    def prepare(self, words: NDArray[Any]) -> Any:
        """The input in the form that ``encode`` takes; not timed."""
        return words

    @abstractmethod
    def encode(self, spec: ChunkSpec, data: Any, levels: Sequence[int] | None = None) -> list[Any]:
        """Payloads of ``levels`` (default all)."""

    @abstractmethod
    def decode(self, spec: ChunkSpec, payloads: list[Any], out: NDArray[Any]) -> Any:
        """Decode into ``out`` and return None, or return the words (buffer or array) where the codec makes its own."""


class Ours(Contestant):
    """One of lynxproto's codecs."""

    threaded = True

    def __init__(self, codec: Codec, preset: str | None) -> None:
        self.instance = codec
        self.codec = codec.codec_id
        self.preset = preset
        self.config = repr(codec)
        self.version = importlib.metadata.version("lynxproto")
        self.levels = codec.levels
        self.exact = codec.exact

    def supports(self, spec: ChunkSpec) -> bool:
        """What the codec says."""
        return self.instance.supports(spec)

    def encode(self, spec: ChunkSpec, data: Any, levels: Sequence[int] | None = None) -> list[Any]:
        """One call of the codec."""
        return self.instance.encode(spec, data, levels=levels)

    def decode(self, spec: ChunkSpec, payloads: list[Any], out: NDArray[Any]) -> Any:
        """One call of the codec."""
        self.instance.decode(spec, payloads, out)

    def start(self, spec: ChunkSpec, payload: Any, out: NDArray[Any]) -> Any:
        """Decode level 0; return the state that :meth:`refine` takes."""
        return self.instance.decode(spec, [payload], out)

    def refine(self, spec: ChunkSpec, state: Any, level: int, payload: Any, out: NDArray[Any]) -> Any:
        """Add one level; return the state."""
        return self.instance.refine(spec, state, level, payload, out)


class Peer(Contestant):
    """Another project's codec: one payload, exact. ``package`` is its distribution on PyPI."""

    package: ClassVar[str]
    module: ClassVar[str]

    def __init__(self) -> None:
        try:
            self.lib: Any = importlib.import_module(self.module)
        except ImportError:
            raise NotInstalled(self.package) from None
        self.version = importlib.metadata.version(self.package)
        self.open()

    def open(self) -> None:
        """Make contexts, once."""

    def encode(self, spec: ChunkSpec, data: Any, levels: Sequence[int] | None = None) -> list[Any]:
        """All payloads: a peer has one level."""
        return self.compress(data)

    @abstractmethod
    def compress(self, data: Any) -> list[Any]:
        """One or more payloads that are all needed."""


def _bytes(words: NDArray[Any]) -> memoryview:
    return words.reshape(-1).view(np.uint8).data


class ZipNN(Peer):
    """ZipNN (arXiv 2411.05239): exponent bytes by Huffman code, in its bfloat16 mode.

    Its ``compress`` reorders bytes of its input in place: it gets a copy, and making that is not timed. The byte
    interface is the fastest of its interfaces, and pieces of about 1 MiB suit it better than a whole cache.
    """

    codec, package, module = "zipnn", "zipnn", "zipnn"
    config = "ZipNN(input_format='byte', bytearray_dtype='bfloat16', threads=1)"

    def open(self) -> None:
        """Make the compressor."""
        self._zipnn = self.lib.ZipNN(input_format="byte", bytearray_dtype="bfloat16", threads=1)

    def supports(self, spec: ChunkSpec) -> bool:
        """bfloat16 only."""
        return spec.dtype == "bfloat16"

    def prepare(self, words: NDArray[Any]) -> Any:
        """A copy, to be destroyed."""
        return bytearray(_bytes(words))

    def compress(self, data: Any) -> list[Any]:
        """One call."""
        return [self._zipnn.compress(data)]

    def decode(self, spec: ChunkSpec, payloads: list[Any], out: NDArray[Any]) -> Any:
        """One call; its result is new memory."""
        return self._zipnn.decompress(payloads[0])


class Zstd(Peer):
    """Zstandard on the words as they are."""

    package, module = "zstandard", "zstandard"
    level: ClassVar[int]

    def open(self) -> None:
        self.config = f"ZstdCompressor(level={self.level})"
        self._compressor = self.lib.ZstdCompressor(level=self.level)
        self._decompressor = self.lib.ZstdDecompressor()

    def prepare(self, words: NDArray[Any]) -> Any:
        return _bytes(words)

    def compress(self, data: Any) -> list[Any]:
        return [self._compressor.compress(data)]

    def decode(self, spec: ChunkSpec, payloads: list[Any], out: NDArray[Any]) -> Any:
        return self._decompressor.decompress(payloads[0])


class Zstd1(Zstd):
    """Level 1."""

    codec, level = "zstd-1", 1


class Zstd3(Zstd):
    """Level 3, the default."""

    codec, level = "zstd-3", 3


class SplitZstd1(Zstd):
    """High and low bytes apart, each by Zstandard level 1 (which beats level 3 on them, in size too)."""

    codec, level = "byte-split+zstd-1", 1

    def supports(self, spec: ChunkSpec) -> bool:
        return spec.word_dtype.itemsize == 2

    def prepare(self, words: NDArray[Any]) -> Any:
        return words.reshape(-1)

    def compress(self, data: Any) -> list[Any]:
        halves = (data >> 8).astype(np.uint8), data.astype(np.uint8)
        return [self._compressor.compress(half) for half in halves]

    def decode(self, spec: ChunkSpec, payloads: list[Any], out: NDArray[Any]) -> Any:
        words = out.reshape(-1).view(np.uint8)
        for place, payload in zip((1, 0), payloads, strict=True):
            words[place::2] = np.frombuffer(self._decompressor.decompress(payload), np.uint8)


class SplitZstd3(SplitZstd1):
    """The same with level 3."""

    codec, level = "byte-split+zstd-3", 3


class Blosc2(Peer):
    """Blosc2 with a shuffle filter and Zstandard level 1, one thread."""

    package, module = "blosc2", "blosc2"
    shuffle: ClassVar[str]

    def open(self) -> None:
        self.config = f"compress2(filters=[{self.shuffle}], codec=ZSTD, clevel=1, typesize=2, nthreads=1)"
        self._parameters = {
            "codec": self.lib.Codec.ZSTD,
            "clevel": 1,
            "nthreads": 1,
            "filters": [self.lib.Filter[self.shuffle]],
            "filters_meta": [0],
        }

    def compress(self, data: Any) -> list[Any]:
        return [self.lib.compress2(data, typesize=data.itemsize, **self._parameters)]

    def decode(self, spec: ChunkSpec, payloads: list[Any], out: NDArray[Any]) -> Any:
        self.lib.decompress2(payloads[0], dst=out, nthreads=1)


class Blosc2Bits(Blosc2):
    """Bit shuffle."""

    codec, shuffle = "blosc2-bitshuffle", "BITSHUFFLE"


class Blosc2Bytes(Blosc2):
    """Byte shuffle: better on these words than the bit shuffle."""

    codec, shuffle = "blosc2-shuffle", "SHUFFLE"


class Lz4(Peer):
    """LZ4, one block a chunk."""

    codec, package, module = "lz4", "lz4", "lz4.block"
    config = "block.compress(mode='default')"

    def prepare(self, words: NDArray[Any]) -> Any:
        return _bytes(words)

    def compress(self, data: Any) -> list[Any]:
        return [self.lib.compress(data)]

    def decode(self, spec: ChunkSpec, payloads: list[Any], out: NDArray[Any]) -> Any:
        return self.lib.decompress(payloads[0])


class Pcodec(Peer):
    """Pcodec (arXiv 2502.06112) on words as integers; its classic mode without deltas is its best setting here."""

    codec, package, module = "pcodec", "pcodec", "pcodec"
    config = "ChunkConfig(compression_level=8, mode_spec=classic, delta_spec=no_op)"

    def open(self) -> None:
        self._standalone = importlib.import_module("pcodec.standalone")
        self._config = self.lib.ChunkConfig(
            compression_level=8, mode_spec=self.lib.ModeSpec.classic(), delta_spec=self.lib.DeltaSpec.no_op()
        )

    def supports(self, spec: ChunkSpec) -> bool:
        return spec.word_dtype.itemsize in (2, 4)

    def prepare(self, words: NDArray[Any]) -> Any:
        return words.reshape(-1)

    def compress(self, data: Any) -> list[Any]:
        return [self._standalone.simple_compress(data, self._config)]

    def decode(self, spec: ChunkSpec, payloads: list[Any], out: NDArray[Any]) -> Any:
        self._standalone.simple_decompress_into(payloads[0], out.reshape(-1))


class SplitZip(Contestant):
    """SplitZip's scheme (arXiv 2605.01708), for its ratio only: its speed is that of a GPU kernel, not of this code.

    A 4-bit code for the 16 commonest exponents, sign and mantissa as they are, and an escape of 7 bytes (chunk, place,
    exponent) for each other value. The codebook is made for each chunk (16 bytes), which can only help the ratio.
    """

    codec = "splitzip-scheme"
    config = "top-16 exponents in 4 bits, sign and mantissa raw, escapes of 7 bytes"
    version = "re-implemented"
    timed = False
    _ESCAPE = np.dtype([("place", "<u4"), ("zero", "u1", 2), ("exponent", "u1")])  # 7 bytes, as in the paper

    def supports(self, spec: ChunkSpec) -> bool:
        return spec.dtype == "bfloat16"

    def encode(self, spec: ChunkSpec, data: Any, levels: Sequence[int] | None = None) -> list[Any]:
        words = data.reshape(-1)
        exponents = ((words >> 7) & 0xFF).astype(np.uint8)
        book = np.argsort(np.bincount(exponents, minlength=256), kind="stable")[::-1][:16].astype(np.uint8)
        codes = np.full(256, 255, np.uint8)
        codes[book] = np.arange(16)
        code = codes[exponents]
        places = np.flatnonzero(code == 255)
        escapes = np.zeros(places.size, self._ESCAPE)
        escapes["place"], escapes["exponent"] = places, exponents[places]
        code = np.append(code & 15, np.zeros(words.size % 2, np.uint8))
        signs = ((words >> 8) & 0x80 | words & 0x7F).astype(np.uint8)
        return [book, code[0::2] | code[1::2] << 4, signs, escapes]

    def decode(self, spec: ChunkSpec, payloads: list[Any], out: NDArray[Any]) -> Any:
        book, pairs, signs, escapes = payloads
        codes = np.stack((pairs & 15, pairs >> 4), axis=1).reshape(-1)[: spec.words]
        exponents = book[codes].astype(np.uint16)
        exponents[escapes["place"]] = escapes["exponent"]
        sign_mantissa = signs.astype(np.uint16)
        out.reshape(-1)[...] = (sign_mantissa & 0x80) << 8 | exponents << 7 | sign_mantissa & 0x7F


#: Everybody else, by name.
PEERS: dict[str, type[Contestant]] = {
    peer.codec: peer
    for peer in (ZipNN, Zstd1, Zstd3, SplitZstd1, SplitZstd3, Blosc2Bits, Blosc2Bytes, Lz4, Pcodec, SplitZip)
}


@dataclass(frozen=True, slots=True)
class Skipped:
    """What was to take part and cannot."""

    codec: str
    reason: str


def select(names: Sequence[str], presets: Sequence[str]) -> tuple[list[Contestant], list[Skipped]]:
    """Contestants for ``names`` (none: everything), with ``presets`` of hq (none: all).

    A name is that of a codec (``hq`` stands for its presets), of a peer, or a codec's config as JSON.

    Raises :class:`~lynxproto.errors.LynxError` for names, presets and configs that do not exist.
    """
    chosen: list[Contestant] = []
    skipped: list[Skipped] = []
    for name in names or [*own_names(presets), *PEERS]:
        if name in PEERS:
            try:
                chosen.append(PEERS[name]())
            except NotInstalled as absent:
                skipped.append(Skipped(name, f"not installed: pip install {absent}"))
        elif name == "hq":
            for preset in presets or PRESETS:
                try:
                    chosen.append(Ours(get_codec("hq", preset=preset), preset))
                except ConfigError as error:
                    if presets:
                        raise
                    skipped.append(Skipped(f"hq {preset}", str(error)))
        elif name.startswith("{"):
            chosen.append(Ours(get_codec(_config(name)), _brief(_config(name))))
        elif name in codec_ids():
            chosen.append(Ours(get_codec(name), None))
        else:
            raise ConfigError(
                f"unknown codec {name!r}; known: {', '.join([*codec_ids(), *PEERS])}, or a config as JSON"
            )
    return chosen, skipped


def own_names(presets: Sequence[str]) -> list[str]:
    """The default choice among lynxproto's codecs: only hq if ``presets`` of it are given."""
    return ["hq"] if presets else ["hq", *UNIFORM, "bitplane"]


def _config(text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a codec config: {error}") from error
    return dict(config)


def _brief(config: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items() if name != "id")
