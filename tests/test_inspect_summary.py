"""Summaries: bytes, order, what went twice and what never went; on streams that are made for it. And the web page."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner
from test_inspect import data, opened, tile
from tools import need

from lynxproto import frames
from lynxproto.capture import CaptureWriter, Direction
from lynxproto.chunk import Tile
from lynxproto.cli import main
from lynxproto.errors import ErrorCode
from lynxproto.frames import TileKey, control_frame
from lynxproto.inspect.summary import Summary
from lynxproto.inspect.timeline import BINS, Timeline
from lynxproto.manifest import Want

T = 7 << 96
TILES = [tile(layer, part) for layer in range(2) for part in ("key", "value")]


def plan(layer: int, levels: int = 2) -> bytes:
    keys = tuple(TileKey.of(t) for t in TILES if t.layer == layer)
    return control_frame(frames.Plan(layer=layer, tiles=keys, levels=(levels,) * len(keys)), T)


def accept(*wants: Want) -> bytes:
    return control_frame(frames.Accept(wants=wants or (Want(),), credit=(0,) * 8), T)


def nack(where: Tile, level: int, attempt: int = 0) -> bytes:
    return control_frame(frames.Nack(items=(frames.NackItem(TileKey.of(where), level, attempt, 1),)), T)


def closed(code: ErrorCode = ErrorCode.NO_ERROR, level: int = 7, end: bool = True) -> bytes:
    return control_frame(frames.Closed(level=level, end=end, final=(0,) * 8, code=code), T)


START = [opened(), accept(), plan(0), plan(1)]
IN_ORDER = [data(t, level, bytes(100 << level)) for level in range(2) for t in TILES]


@pytest.fixture
def summarize(tmp_path):
    """Record frames (NACK and ACCEPT go the other way), one a millisecond, and summarize."""

    def run(*stream: bytes) -> dict:
        path = tmp_path / "a.lynx"
        times = iter(range(0, 10**12, 10**6))
        back = (frames.FrameType.NACK, frames.FrameType.ACCEPT, frames.FrameType.REJECT)
        with CaptureWriter(path, clock=lambda: next(times)) as writer:
            stripe = writer.opened()
            for frame in stream:
                writer.data(stripe, Direction(frame[6] in back), [frame])
        result = CliRunner().invoke(main, ["inspect", str(path), "--summary", "--json"])
        found = json.loads(result.output)
        assert result.exit_code == (3 if found["fault_count"] else 0)
        text = CliRunner().invoke(main, ["inspect", str(path), "--summary"]).output
        assert f"{found['inversions']['frames']} chunks" in text
        return found

    return run


def test_a_transfer_in_order(summarize):
    s = summarize(*START, *IN_ORDER, closed())
    assert s["schema"] == "lynxproto.inspect.summary/1"
    assert s["frames"] == 13
    assert s["checksums"] == {"ok": 13, "bad": 0, "cut": 0}
    assert s["types"]["DATA"] == {"frames": 8, "bytes": 8 * 64 + 4 * 100 + 4 * 200}
    assert s["uncompressed"] == 4 * 512
    assert s["levels"] == [
        {"level": 0, "chunks": 4, "bytes": 400, "ratio": round(400 / 2048, 6)},
        {"level": 1, "chunks": 4, "bytes": 800, "ratio": round(800 / 2048, 6)},
    ]
    assert s["layers"][1] == {"layer": 1, "uncompressed": 1024, "bytes": [200, 400], "ratio": round(600 / 1024, 6)}
    (transfer,) = s["transfers"]
    assert (transfer["outcome"], transfer["missing"]) == ("complete", 0)
    assert transfer["opened"] == 0.002
    assert transfer["levels"][1] == {"level": 1, "planned": 4, "chunks": 4, "bytes": 800, "last": 0.013}
    for name in ("inversions", "layer_inversions", "duplicates", "resends"):
        assert s[name] == {"frames": 0, "bytes": 0}
    assert s["missing_chunks"] == s["nacked_chunks"] == s["untracked_frames"] == 0
    assert sum(s["timeline"]["levels"]["1"]) == 800 + 4 * 64


def test_a_residual_before_a_waiting_anchor_is_an_inversion(summarize):
    order = [0, 4, 1, 2, 5, 3, 6, 7]  # residuals of the first two tiles go too early
    s = summarize(*START, *(IN_ORDER[i] for i in order))
    assert s["inversions"] == {"frames": 2, "bytes": 400}
    assert s["contended"] == {"frames": 6, "bytes": 800}
    assert s["transfers"][0]["outcome"] == "not closed"


def test_an_anchor_before_an_earlier_layer_is_a_layer_inversion(summarize):
    s = summarize(*START, *(IN_ORDER[i] for i in (2, 0, 3, 1)))
    assert s["layer_inversions"] == {"frames": 2, "bytes": 200}
    assert s["inversions"]["frames"] == 0


def test_what_is_not_wanted_does_not_wait(summarize):
    want = Want(layers=(0, 1), levels=1)
    s = summarize(opened(), plan(0), plan(1), accept(want), IN_ORDER[0], IN_ORDER[1], IN_ORDER[4])
    assert s["inversions"]["frames"] == 0
    assert s["missing_chunks"] == 0
    assert s["transfers"][0]["levels"][0]["planned"] == 2


def test_gaps_are_planned_chunks_that_never_went(summarize):
    s = summarize(*START, *IN_ORDER[:6])
    assert s["missing_chunks"] == 2
    assert s["transfers"][0]["levels"][1]["planned"] == 4


def test_cancelled_levels_are_no_gap(summarize):
    assert summarize(*START, *IN_ORDER[:4], closed(level=0, end=False))["missing_chunks"] == 0
    s = summarize(*START, *IN_ORDER[:1], closed(ErrorCode.CANCELLED))
    assert s["missing_chunks"] == 0
    assert s["transfers"][0]["outcome"] == "CANCELLED"


def test_duplicates_and_resends_are_told_apart(summarize):
    first, second = IN_ORDER[0], bytearray(IN_ORDER[1])
    second[70] ^= 1
    s = summarize(*START, first, first, bytes(second), IN_ORDER[1], nack(TILES[0], 0), first)
    assert s["duplicates"] == {"frames": 1, "bytes": 100}
    assert s["resends"] == {"frames": 2, "bytes": 200}
    assert s["nacked_chunks"] == 1
    assert s["levels"][0]["chunks"] == 2
    assert s["fault_count"] == 1


def test_a_tile_that_is_sent_again_whole_is_a_resend(summarize):
    again = [data(TILES[0], level, bytes(100 << level), attempt=1) for level in range(2)]
    s = summarize(*START, *IN_ORDER, nack(TILES[0], 0, 1), *again, closed())
    assert s["resends"] == {"frames": 2, "bytes": 300}
    assert s["duplicates"]["frames"] == 0
    assert s["uncompressed"] == 4 * 512


def test_silence_while_chunks_wait(summarize):
    ping = control_frame(frames.Ping(id=1, probe=False))
    s = summarize(*START, IN_ORDER[0], *[ping] * 20, *IN_ORDER[1:], *[ping] * 50, IN_ORDER[0])
    assert s["longest_silence"] == {"seconds": 0.021, "until": 0.027}


@pytest.mark.parametrize("times", [[0, 5, 10**6, 10**9, 3 * 10**12], [7] * 5, [10**12, 0]])
def test_a_timeline_keeps_all_bytes_in_as_many_bins(times):
    timeline = Timeline()
    for n, time in enumerate(times):
        timeline.data(time, time, n % 2, n, 1 << n)
        timeline.control_frame(time, 1)
    assert sum(sum(row) for row in timeline.levels.values()) == (1 << len(times)) - 1
    assert sum(timeline.control) == len(times)
    assert timeline.used <= BINS
    assert max(times) < timeline.width * timeline.used
    for (level, layer), row in timeline.layers.items():
        at = times[layer] // timeline.width
        assert row[at] == 1 << layer
        assert timeline.levels[level][at] >= row[at]


def test_long_frames_are_spread():
    timeline = Timeline()
    timeline.data(timeline.width, 5 * timeline.width - 1, 0, 3, 403)
    assert timeline.levels[0][:6] == timeline.layers[0, 3][:6] == [0, 100, 100, 100, 103, 0]


def test_an_empty_summary_has_all_keys():
    assert set(Summary().as_object()) >= {"levels", "layers", "transfers", "timeline", "faults"}


def test_the_page_in_a_browser(summarize, tmp_path):
    evil = "<script>document.title='owned'</script>"
    bye = control_frame(frames.GoAway(code=ErrorCode.INTERNAL, text=evil))
    broken = bytearray(IN_ORDER[0])
    broken[70] ^= 1
    summarize(*START, *IN_ORDER, bytes(broken), closed(), bye)
    page = tmp_path / "page.html"
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "a.lynx"), "--html", str(page)])
    assert (result.exit_code, result.output) == (3, f"wrote {page}\n")
    text = page.read_text()
    assert "<script" not in text
    assert not re.search(r"(src|href|url\()\s*[=(]?\s*[\"']?\w+:", text), "the page loads something"
    browser = need("chromium")
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}")
    dom = browser(*options, "--dump-dom", page.as_uri())
    assert "<title>" + str(tmp_path / "a.lynx") in dom
    timeline = re.search(r'<svg id="timeline".*?</svg>', dom, re.DOTALL)
    assert timeline is not None
    assert {"control", "anchor", "residual 1"} == set(re.findall(r"<title>([a-z0-9 ]+):", timeline[0]))
    heat = re.findall(r'<svg class="heat" id="heat-(\d)".*?</svg>', dom, re.DOTALL)
    assert heat == ["0", "1"]
    assert dom.count("<title>layer 1: ") == 4
    assert "1 fault<" in dom
    sizes = []
    for name, url in (("blank", "about:blank"), ("page", page.as_uri())):
        shot = tmp_path / f"{name}.png"
        browser(*options, f"--screenshot={shot}", "--window-size=900,1200", url)
        assert shot.read_bytes().startswith(b"\x89PNG")
        sizes.append(shot.stat().st_size)
    assert sizes[1] > 2 * sizes[0], "the page is blank"
