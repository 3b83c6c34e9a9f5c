"""A summary as text for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from lynxproto.capture import Direction
from lynxproto.inspect.context import plural
from lynxproto.inspect.model import printable
from lynxproto.inspect.order import Transfer
from lynxproto.inspect.summary import Summary
from lynxproto.inspect.table import fault_line

__all__ = ["level_name", "report"]

_SHADES: Final = " .:-=+*#%@"
_COLUMNS: Final = 64
_SHOWN: Final = 20


def level_name(level: int) -> str:
    """``anchor``, ``residual 1``..."""
    return "anchor" if level == 0 else f"residual {level}"


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.3f} MB"


def _ratio(nbytes: int, of: int) -> str:
    return f"{nbytes / of:.4f}" if of else "-"


def _at(time: int | None) -> str:
    return "-" if time is None else f"{time / 1e9:.4f}"


def report(s: Summary, name: str, *, colour: bool) -> Iterator[str]:
    """Lines of text."""
    bold, reset = ("\x1b[1m", "\x1b[0m") if colour else ("", "")
    both = f"{_mb(s.directions[Direction.TO_SERVER])} ->, {_mb(s.directions[Direction.TO_CLIENT])} <-"
    states = ", ".join(f"{n} {state}" for state, n in sorted(s.checksums.items(), reverse=True))
    where = f"{plural(s.frames, 'frame')} on {plural(len(s.stripes), 'stripe')}"
    yield f"{bold}{name}{reset}: {where} in {s.seconds:.3f} s; {both}"
    yield f"checksums: {states or 'none'}"
    yield ""
    yield f"{bold}{'type':<10} {'frames':>8} {'bytes':>14}{reset}"
    for kind, tally in sorted(s.types.items(), key=lambda item: -item[1].bytes):
        yield f"{kind:<10} {tally.frames:>8} {tally.bytes:>14,}"
    yield from _levels(s, bold, reset)
    yield from _layers(s, bold, reset)
    yield from _transfers(list(s.order.transfers.values()), bold, reset)
    yield from _order(s, bold, reset)
    yield from _timeline(s, bold, reset)
    if s.faults:
        yield ""
        yield f"{bold}faults{reset}: {s.fault_count}"
        for fault in s.faults[:_SHOWN]:
            yield fault_line(fault, colour=colour)
        if s.fault_count > _SHOWN:
            yield f"        ... and {s.fault_count - _SHOWN} more"


def _levels(s: Summary, bold: str, reset: str) -> Iterator[str]:
    top = s.top_level() + 1
    if not top:
        return
    yield ""
    yield f"{bold}{'level':<12} {'chunks':>8} {'bytes':>14} {'ratio':>8} {'so far':>8}{reset}"
    total = 0
    for level, tally in enumerate(s.levels[:top]):
        total += tally.bytes
        share, so_far = _ratio(tally.bytes, s.uncompressed), _ratio(total, s.uncompressed)
        yield f"{level_name(level):<12} {tally.frames:>8} {tally.bytes:>14,} {share:>8} {so_far:>8}"
    whole = total + s.data_headers
    yield f"{'with headers':<12} {'':>8} {whole:>14,} {'':>8} {_ratio(whole, s.uncompressed):>8}"
    yield f"{'uncompressed':<12} {'':>8} {s.uncompressed:>14,}"


def _layers(s: Summary, bold: str, reset: str) -> Iterator[str]:
    top = s.top_level() + 1
    if not s.layers:
        return
    yield ""
    heads = "".join(f" {level_name(level):>14}" for level in range(top))
    yield f"{bold}{'layer':<6}{heads} {'uncompressed':>14} {'ratio':>8}{reset}"
    for number, layer in sorted(s.layers.items()):
        cells = "".join(f" {nbytes:>14,}" for nbytes in layer.levels[:top])
        yield f"{number:<6}{cells} {layer.uncompressed:>14,} {_ratio(sum(layer.levels), layer.uncompressed):>8}"


def _transfers(transfers: Sequence[Transfer], bold: str, reset: str) -> Iterator[str]:
    if not transfers:
        return
    yield ""
    yield f"{bold}transfers{reset} (times in seconds)"
    for t in transfers[:_SHOWN]:
        yield f"{t.id >> 96:08x}  {printable(t.name, 100) or 'its OPEN is not here'}"
        levels = ", ".join(f"{level_name(n)} {_at(t.last[n])}" for n, level in enumerate(t.levels) if level.frames)
        yield (
            f"          opened {_at(t.opened)}, accepted {_at(t.accepted)}, result {_at(t.result)}; "
            f"last of {levels or 'nothing'}"
        )
        total = sum(level.bytes for level in t.levels)
        missing = t.missing()
        yield (
            f"          closed {_at(t.closed)}: {t.outcome}; {_mb(total)}, ratio {_ratio(total, t.uncompressed)}"
            f"{f'; {missing} planned chunks never went' if missing else ''}"
        )
    if len(transfers) > _SHOWN:
        yield f"... and {len(transfers) - _SHOWN} more"


def _order(s: Summary, bold: str, reset: str) -> Iterator[str]:
    order = s.order
    contended = f" of {_mb(order.contended.bytes)} sent while an anchor waited" if order.contended.frames else ""
    missing = sum(t.missing() for t in order.transfers.values())
    rows = [
        ("priority inversions", f"{order.inversions.frames} chunks, {_mb(order.inversions.bytes)}{contended}"),
        ("layer inversions", f"{order.layer_inversions.frames} anchors, {_mb(order.layer_inversions.bytes)}"),
        ("gaps", f"{missing} planned chunks never went"),
        ("longest silence", f"{order.silence[0] / 1e9:.4f} s until {_at(order.silence[1])}, while chunks waited"),
        ("duplicates", f"{order.duplicates.frames} chunks, {_mb(order.duplicates.bytes)}"),
        ("resends", f"{order.resends.frames} chunks, {_mb(order.resends.bytes)}; {order.nacks} asked for by NACK"),
    ]
    if order.untracked:
        rows.append(("not judged", f"{order.untracked} frames, for lack of memory"))
    yield ""
    yield f"{bold}order{reset}"
    for what, said in rows:
        yield f"{what:<20} {said}"


def _timeline(s: Summary, bold: str, reset: str) -> Iterator[str]:
    t = s.timeline
    if not t.used or not s.stop:
        return
    fold = -(-t.used // _COLUMNS)
    rows = [("control", t.control), *((level_name(level), row) for level, row in sorted(t.levels.items()))]
    folded = [(what, [sum(row[i : i + fold]) for i in range(0, t.used, fold)]) for what, row in rows]
    most = max(max(row) for _, row in folded) or 1
    width = fold * t.width / 1e9
    yield ""
    rate = f"{_mb(most)} ({most * 8 / width / 1e6:,.1f} Mbit/s)"
    yield f"{bold}timeline{reset}: from {_at(s.start)}, {width:.4g} s a column, @ is {rate}"
    for what, row in folded:
        shades = "".join(_SHADES[-(-n * (len(_SHADES) - 1) // most)] for n in row)
        yield f"{what:<12} |{shades}|"
