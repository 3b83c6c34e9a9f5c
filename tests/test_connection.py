"""Two connections in memory: every frame type, honest links."""

from __future__ import annotations

import numpy as np
from links import World, cache

from lynxproto import events as ev


def check_equal(world: World, transfer: int, words, *, sender: int = 0) -> None:
    got = world.shells[1 - sender].received[transfer]
    assert got.released is True and got.complete and got.error is None
    assert world.shells[sender].released[transfer] is True
    manifest = world.shells[sender].sent[transfer][0]
    for spec in manifest.layers:
        for part in spec.parts:
            out = np.zeros_like(words[spec.index, part])
            for tile in got.plan:
                if (tile.layer, tile.part) == (spec.index, part):
                    assert tile in got.verified
                    out[:, list(tile.tokens)] = got.words(tile)
            assert np.array_equal(out, words[spec.index, part])


def test_a_cache_arrives():
    world = World()
    words = cache()
    transfer = world.client.send(words, world.now)
    world.settle()
    check_equal(world, transfer, words)
    assert world.server.received[transfer].result == (7, 1.5)
    assert len(world.client.seen(ev.HandshakeCompleted)) == len(world.server.seen(ev.HandshakeCompleted)) == 1
