"""A summary as one self-contained web page: no scripts, nothing loaded from anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Final

from lynxproto.inspect.context import plural
from lynxproto.inspect.model import printable
from lynxproto.inspect.report import level_name, report
from lynxproto.inspect.summary import Summary
from lynxproto.inspect.timeline import Timeline

__all__ = ["page"]

#: Hues of levels, from the anchor on; control frames are grey.
_HUES: Final = (152, 205, 262, 318, 20, 45, 80, 0)
_WIDTH, _HEIGHT, _LEFT = 960, 220, 88
_MAX_ROWS: Final = 256

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #66707e; --line: #d5dae1; --back: #fff; --card: #f6f7f9 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #98a2b0; --line: #353d49; --back: #14181e; --card: #1c222b } }
body { margin: 0 auto; padding: 24px; max-width: 1080px; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 22px; margin: 0 0 4px; overflow-wrap: anywhere } h2 { font-size: 16px; margin: 32px 0 8px }
p { color: var(--soft); margin: 4px 0 } svg { display: block; width: 100%; height: auto }
text { fill: var(--soft); font-size: 11px } .axis { stroke: var(--line) }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 12px; overflow-x: auto;
  font: 12.5px/1.45 ui-monospace, monospace }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin: 0 5px 0 14px }
.bad { color: #c0392b }
"""


def _colour(level: int) -> str:
    return "hsl(215 8% 60%)" if level < 0 else f"hsl({_HUES[level % len(_HUES)]} 58% 45%)"


def page(s: Summary, name: str) -> str:
    """The page. Text from the wire is escaped."""
    title = escape(printable(name, 200))
    state = f'<span class="bad">{plural(s.fault_count, "fault")}</span>' if s.fault_count else "no faults"
    size = f"{plural(s.frames, 'frame')}, {s.bytes / 1e6:,.2f} MB on {plural(len(s.stripes), 'stripe')}"
    text = "\n".join(report(s, name, colour=False))
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        f"<p>{size} in {s.seconds:.3f} s, {state}</p>",
        *_timeline(s.timeline),
        *_heat(s.timeline),
        "<h2>Summary</h2>",
        f'<pre id="summary">{escape(text)}</pre>',
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _axis(t: Timeline, y: int) -> Iterator[str]:
    """Times below a chart."""
    total = t.used * t.width / 1e9
    step = _round_step(total / 8)
    yield f'<line class="axis" x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y}" y2="{y}"/>'
    n = 0
    while n * step <= total:
        x = _LEFT + n * step / total * _WIDTH
        yield f'<text x="{x:.1f}" y="{y + 14}" text-anchor="middle">{n * step:.6g} s</text>'
        n += 1


def _round_step(step: float) -> float:
    """1, 2 or 5 times a power of ten, at least ``step``."""
    power = 10.0 ** len(str(int(step))) if step >= 1 else 1.0
    while power > step:
        power /= 10
    return next(power * n for n in (1, 2, 5, 10) if power * n >= step)


def _timeline(t: Timeline) -> Iterator[str]:
    """Stacked bars: the link's use by level."""
    rows = [(-1, t.control), *sorted(t.levels.items())]
    most = max((sum(row[i] for _, row in rows) for i in range(t.used)), default=0)
    if not most:
        return
    seconds = t.width / 1e9
    yield "<h2>Timeline by level</h2>"
    keys = "".join(
        f'<span class="key" style="background:{_colour(n)}"></span>{"control" if n < 0 else level_name(n)}'
        for n, _ in rows
    )
    yield f"<p>bytes a bin of {seconds:.3g} s; the top is {most * 8 / seconds / 1e6:,.1f} Mbit/s. {keys}</p>"
    yield f'<svg id="timeline" role="img" aria-label="timeline" viewBox="0 0 {_LEFT + _WIDTH + 20} {_HEIGHT + 24}">'
    width = _WIDTH / t.used
    for i in range(t.used):
        y = float(_HEIGHT)
        for level, row in rows:
            if row[i]:
                height = row[i] / most * (_HEIGHT - 10)
                y -= height
                what = "control" if level < 0 else level_name(level)
                yield (
                    f'<rect x="{_LEFT + i * width:.2f}" y="{y:.2f}" width="{max(width - 0.3, 0.5):.2f}" '
                    f'height="{height:.2f}" fill="{_colour(level)}">'
                    f"<title>{what}: {row[i]:,} bytes, {i * seconds:.4g} to {(i + 1) * seconds:.4g} s</title></rect>"
                )
    yield from _axis(t, _HEIGHT)
    yield "</svg>"


def _heat(t: Timeline) -> Iterator[str]:
    """One map a level: layers down, time across."""
    for level in sorted(t.levels):
        layers = sorted(layer for n, layer in t.layers if n == level)[:_MAX_ROWS]
        if not layers:
            continue
        most = max(max(t.layers[level, layer]) for layer in layers)
        row_height = max(3, min(14, 420 // len(layers)))
        height = row_height * len(layers)
        yield f"<h2>Layers: {level_name(level)}</h2>"
        yield f"<p>the darkest cell is {most / 1e3:,.1f} kB in {t.width / 1e9:.3g} s</p>"
        yield (
            f'<svg class="heat" id="heat-{level}" role="img" aria-label="layers of level {level}" '
            f'viewBox="0 0 {_LEFT + _WIDTH + 20} {height + 24}">'
        )
        width = _WIDTH / t.used
        for r, layer in enumerate(layers):
            if r % max(1, 14 // row_height) == 0:
                yield f'<text x="{_LEFT - 8}" y="{(r + 0.8) * row_height:.1f}" text-anchor="end">layer {layer}</text>'
            for i, nbytes in enumerate(t.layers[level, layer][: t.used]):
                if nbytes:
                    yield (
                        f'<rect x="{_LEFT + i * width:.2f}" y="{r * row_height}" width="{width + 0.1:.2f}" '
                        f'height="{row_height - 0.5}" fill="{_colour(level)}" '
                        f'fill-opacity="{0.15 + 0.85 * nbytes / most:.2f}">'
                        f"<title>layer {layer}: {nbytes:,} bytes at {i * t.width / 1e9:.4g} s</title></rect>"
                    )
        yield from _axis(t, height)
        yield "</svg>"
