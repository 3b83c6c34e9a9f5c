"""The inbox of a decode worker, in any order of events: one outcome for each claim, and none without verified words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("prometheus_client")

import vllm_engine  # noqa: F401  # puts the stub of vLLM into the path

from lynxproto.errors import LimitError, LynxError
from lynxproto.integrations.vllm.inbox import Cache, Inbox, Piece
from lynxproto.integrations.vllm.metadata import Load
from lynxproto.manifest import Identity, LayerSpec, Manifest

IDENTITY = Identity(model="m")
LAYERS, HEADS, TOKENS, DIM = 2, 4, 8, 2


class World:
    """An inbox, and blocks as a grid: which cells of which request were filled, and with what."""

    def __init__(self, **more: Any) -> None:
        cache = Cache(
            identity=IDENTITY,
            dtype="bfloat16",
            layers=(0, 1),
            heads=range(HEADS),
            key_dim=DIM,
            value_dim=DIM,
            max_tokens=TOKENS,
        )
        self.inbox = Inbox(
            cache, self.fill, **({"idle": 5.0, "timeout": 50.0, "lease": 20.0, "buffer_bytes": 1 << 20} | more)
        )
        self.blocks: dict[str, Any] = {}
        self.over: dict[str, LynxError | None] = {}

    def fill(self, load: Load, layer: LayerSpec, keys: Any, values: Any) -> None:
        assert load.request not in self.over, "blocks of a request that is over are written"
        assert load.start <= layer.token_start < layer.token_stop <= load.stop
        heads = slice(layer.head_start, layer.head_start + layer.kv_heads)
        grid = self.blocks.setdefault(load.request, np.zeros((LAYERS, HEADS, TOKENS), np.int64))
        assert keys.shape == values.shape == (layer.kv_heads, layer.tokens, DIM)
        grid[layer.index, heads, layer.token_start : layer.token_stop] = keys[:, :, 0]
        self.collect()

    def collect(self) -> None:
        for outcome in self.inbox.outcomes:
            assert outcome.request not in self.over, "two outcomes"
            self.over[outcome.request] = outcome.error
        self.inbox.outcomes.clear()


def manifest(name: str, heads: tuple[int, int], tokens: tuple[int, int]) -> Manifest:
    layers = tuple(
        LayerSpec(
            index=i,
            kv_heads=heads[1] - heads[0],
            head_start=heads[0],
            key_dim=DIM,
            value_dim=DIM,
            token_start=tokens[0],
            token_stop=tokens[1],
        )
        for i in range(LAYERS)
    )
    return Manifest(identity=IDENTITY, dtype="bfloat16", layers=layers, prompt_tokens=TOKENS, request_id=name)


def arrive(piece: Piece, mark: int = 7) -> None:
    for array in piece.arrays.values():
        array[:] = mark


spans = st.sampled_from([(0, 4), (0, 2), (2, 4)]), st.sampled_from([(0, 8), (0, 3), (3, 8)])
events = st.one_of(
    st.tuples(st.just("offer"), st.sampled_from("ab"), *spans),
    st.tuples(st.just("layer"), st.integers(0, 5)),
    st.tuples(st.just("fail"), st.integers(0, 5)),
    st.tuples(st.just("claim"), st.sampled_from("ab"), st.sampled_from([0, 3])),
    st.tuples(st.just("abort"), st.integers(0, 3)),
    st.tuples(st.just("drop"), st.sampled_from("ab")),
    st.tuples(st.just("time"), st.floats(0.1, 8)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(events, max_size=30))
def test_any_order(script: list[Any]) -> None:
    world, now = World(), 0.0
    inbox = world.inbox
    pieces: list[tuple[Piece, int]] = []  # and how many of its layers have come
    claims: list[Load] = []
    for event in script:
        match event:
            case ("offer", name, heads, tokens):
                pieces.append((inbox.offer(manifest(name, heads, tokens), now), 0))
                arrive(pieces[-1][0])
            case ("layer", index) if index < len(pieces) and pieces[index][1] < LAYERS:
                piece, done = pieces[index]
                pieces[index] = piece, done + 1
                inbox.layer_exact(piece, piece.manifest.layers[done], 1, now)
            case ("fail", index) if index < len(pieces) and pieces[index][1] < LAYERS:
                pieces[index] = pieces[index][0], LAYERS
                inbox.piece_failed(pieces[index][0], LynxError("broken"), now)
            case ("claim", name, start):
                claims.append(Load(f"request-{len(claims)}", name, (0,), start, TOKENS))
                inbox.claim(claims[-1], now)
            case ("abort", index) if index < len(claims):
                inbox.abort(claims[index].request)
            case ("drop", name) if all(load.name != name or load.request in world.over for load in claims):
                inbox.drop(name)
            case ("time", seconds):
                now += seconds
                timer = inbox.next_timer()
                before = len(world.over)
                inbox.handle_timer(now)
                world.collect()
                assert timer is not None or len(world.over) == before
        world.collect()
        for load in claims:
            if load.request in world.over and world.over[load.request] is None:
                assert (world.blocks[load.request][:, :, load.start : load.stop] == 7).all()
    inbox.handle_timer(now + 1000)
    world.collect()
    assert set(world.over) == {load.request for load in claims}, "a claim without an outcome"
    assert inbox.next_timer() is None
    assert inbox._room == 1 << 20, "memory of pieces is not given back"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(*spans), min_size=1, max_size=5), st.sampled_from([0, 3]), st.randoms())
def test_a_claim_is_done_when_exact_layers_cover_it(rectangles: list[Any], start: int, random: Any) -> None:
    world = World()
    pieces = [world.inbox.offer(manifest("a", *rectangle), 0.0) for rectangle in rectangles]
    steps: list[Any] = [(piece, layer) for piece in pieces for layer in piece.manifest.layers]
    random.shuffle(steps)
    steps.insert(random.randint(0, len(steps)), None)
    missing = {(i, h, t) for i in range(LAYERS) for h in range(HEADS) for t in range(start, TOKENS)}
    claimed = False
    for step in steps:
        if world.over:
            break
        if step is None:
            world.inbox.claim(Load("request", "a", (0,), start, TOKENS), 1.0)
            claimed = True
        else:
            piece, layer = step
            arrive(piece)
            world.inbox.layer_exact(piece, layer, 1, 1.0)
            heads = range(layer.head_start, layer.head_start + layer.kv_heads)
            tokens = range(layer.token_start, layer.token_stop)
            missing -= {(layer.index, h, t) for h in heads for t in tokens}
        world.collect()
        assert world.over == ({"request": None} if claimed and not missing else {})
    if world.over:
        assert (world.blocks["request"][:, :, start:] == 7).all()


def test_room_is_given_back_and_refused() -> None:
    size = manifest("a", (0, 4), (0, 8)).nbytes
    world = World(buffer_bytes=size)
    piece = world.inbox.offer(manifest("a", (0, 4), (0, 8)), 0.0)
    with pytest.raises(LimitError, match="buffer_bytes"):
        world.inbox.offer(manifest("b", (0, 4), (0, 8)), 0.0)
    world.inbox.drop("a")
    assert piece.dropped
    world.inbox.offer(manifest("b", (0, 4), (0, 8)), 0.0)


def test_a_name_that_was_refused_fails_who_asks_for_it_later() -> None:
    world = World()
    world.inbox.refused("a", LynxError("of another model"), 0.0)
    world.inbox.claim(Load("request", "a", (0,), 0, TOKENS), 1.0)
    world.collect()
    assert str(world.over["request"]) == "of another model"


def test_two_requests_cannot_wait_for_one_cache() -> None:
    world = World()
    for request in ("one", "two"):
        world.inbox.claim(Load(request, "a", (0,), 0, TOKENS), 0.0)
    world.collect()
    assert "waits for the same cache" in str(world.over["two"])
    assert "one" not in world.over
