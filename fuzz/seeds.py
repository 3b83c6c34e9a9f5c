"""First inputs of the fuzz targets, from the vectors of the specification and from a recorded session."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from lynxproto import capture
from lynxproto.conformance.vectors import Case, default_vectors, load
from lynxproto.frames import HEADER_SIZE, FrameType

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from links import World, cache

from fuzz.targets.codecs import VECTORS

_SCRIPTS = 200


def write_seeds(folder: Path) -> None:
    """Make ``folder``/TARGET for each target that can use more than nothing to begin with."""
    cases = load(default_vectors())
    frames = _genuine_frames()
    said = [*frames, *_data_of(cases, "frames")]
    inputs = {
        "frames": [*map(_as_body, said), *(b"\0" + frame for frame in said)],
        "capture": [*_captures(frames), *_data_of(cases, "capture")],
        "connection": _scripts(1),
        "codecs": [*_scripts(2), *_of_vectors(cases)],
        "hq_decode": _scripts(3),
        "hq_encode": _scripts(5),
        "bitplane": _scripts(4),
        "crc32c": _scripts(6),
        "wire": _wire(cases, said),
        "objects": [bytes([number]) for number in range(8)] + _scripts(7),
    }
    for target, seeds in inputs.items():
        (folder / target).mkdir(parents=True, exist_ok=True)
        for i, seed in enumerate(seeds):
            (folder / target / f"{i:04}").write_bytes(seed)


def _genuine_frames() -> list[bytes]:
    """What two honest sides say in a whole transfer."""
    world = World()
    pipe = world.pipes[0]
    said: list[bytes] = []
    deliver = pipe.deliver

    def record(side: int, frame: bytes) -> None:
        said.append(frame)
        deliver(side, frame)

    pipe.deliver = record  # type: ignore[method-assign]  # a recorder of this one pipe
    world.client.send(cache(layers=1, heads=1, tokens=8, dim=2), world.now, step=4)
    world.settle()
    world.client.connection.close(world.now)
    world.settle()
    return said


def _data_of(cases: list[Case], op: str) -> list[bytes]:
    return [bytes.fromhex(case.input["data"]) for case in cases if case.op == op]


def _of_vectors(cases: list[Case]) -> list[bytes]:
    """For the codecs target: each vector as it is."""
    count = sum(case.op == "decode" for case in cases)
    return [bytes([VECTORS]) + i.to_bytes(2, "little") for i in range(count)]


def _wire(cases: list[Case], said: list[bytes]) -> list[bytes]:
    """For the wire target: what it is to be read as, then the bytes."""
    kinds = {FrameType.OPEN: b"\4", FrameType.PLAN: b"\5", FrameType.END: b"\6"}
    bodies = [kinds[kind] + frame[HEADER_SIZE:] for frame in said if (kind := _type(frame)) in kinds]
    captures = [b"\2" + data for data in [*_data_of(cases, "capture"), _captures(said)[0]]]
    return [*(b"\0" + frame for frame in said), *bodies, *captures, *(b"\3" + m for m in _data_of(cases, "manifest"))]


def _type(frame: bytes) -> int:
    return int.from_bytes(frame[6:8], "little")


def _as_body(frame: bytes) -> bytes:
    """For the frames target: the type, then what follows the header."""
    return frame[6:7] + frame[HEADER_SIZE:]


def _captures(frames: list[bytes]) -> list[bytes]:
    """A capture file, and a raw stream."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "seed.lynx"
        with capture.CaptureWriter(path) as writer:
            stripe = writer.opened("seed")
            for i, frame in enumerate(frames[:40]):
                writer.data(stripe, list(capture.Direction)[i % 2], [frame])
            writer.closed(stripe)
        return [path.read_bytes(), b"".join(frames[:20]), *frames[:20]]


def _scripts(seed: int) -> list[bytes]:
    """Decisions drawn at random: most are allowed, and coverage keeps those that lead further."""
    random = Random(seed)
    return [random.randbytes(random.randrange(8, 400)) for _ in range(_SCRIPTS)]
