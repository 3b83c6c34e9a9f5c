"""``lynxproto send``: ship dumped caches."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lynxproto.commands import logs
from lynxproto.commands.options import SessionOptions, session_command
from lynxproto.errors import CalibrationError, ConfigError, LynxError

if TYPE_CHECKING:
    from lynxproto.cachefile import Cache
    from lynxproto.calibration import Calibration
    from lynxproto.commands.stopping import Stopping
    from lynxproto.linkpolicy import AutoPolicy
    from lynxproto.policy import Policy

__all__ = ["send"]


@session_command(
    "send",
    click.Argument(["cache"], type=click.Path(path_type=Path)),
    click.Argument(["url"]),
    click.Option(
        ["--policy"], default="lynx", show_default=True,
        type=click.Choice(["auto", "lynx", "exact", "raw", "bf16", "int8", "int4"]),
        help="How to cut and encode the cache: lynx is progressive, exact is coded without an anchor, raw (bf16) is not"
        " coded; auto measures link and codecs and takes the best of these. int8 and int4 are lossy baselines.",
    ),
    click.Option(
        ["--preset"], type=click.Choice(["fast", "balanced", "dense"]), default="balanced", show_default=True,
        help="Of policy lynx: speed of coding against size of the anchor.",
    ),
    click.Option(
        ["--calibration"], type=click.Path(dir_okay=False, path_type=Path),
        help="Of policies lynx and auto: what `lynxproto calibrate` measured of the cache's model.",
    ),
    click.Option(
        ["--policy-file"], type=click.Path(dir_okay=False, path_type=Path),
        help="What `lynxproto probe` found good for the cache's model: precision by token, instead of --policy.",
    ),
    click.Option(["--budget"], type=float, help="With --policy-file: level 0's share of the bytes."),
    click.Option(
        ["--importance"], type=click.Choice(["attention", "even", "key-norms", "position"]),
        help="With --policy-file: what tokens are ranked by. Default: attention with --attention, else even (alike).",
    ),
    click.Option(
        ["--attention"], type=click.Path(dir_okay=False, path_type=Path),
        help="With --policy-file: a .npy of how much each token was attended to, [layers, kv_heads, tokens].",
    ),
    click.Option(
        ["--state"], type=click.Path(file_okay=False, path_type=Path),
        help="Folder that keeps the secrets of unfinished transfers: when this command is given again after it was"
        " killed, only what the receiver lacks is sent. With the policy auto only if it chooses the same again.",
    ),
    click.Option(["--no-residual"], is_flag=True, help="With --policy-file: level 0 alone; what arrives is lossy."),
    click.Option(["--request-id"], help="What the receiver knows the cache by (default: its file's name)."),
    click.Option(["--model"], help="Model of a saved DynamicCache (.pt), which does not say itself."),
    click.Option(["--revision"], default="", help="Revision of that model."),
)  # fmt: skip
def send(options: SessionOptions, content: Mapping[str, Any], cache: Path, url: str, **own: Any) -> None:
    """Send CACHE to URL, e.g. tcps://decode:7411.

    CACHE is a dumped KV cache (a file that `recv` or lynxproto.cachefile made), a DynamicCache of transformers that
    torch.save wrote (.pt), or a directory of such files, which are sent one after the other.
    """
    from lynxproto.commands import stopping

    stopping.run(lambda stop: _send(stop, options, content, cache, url, **own), signal.SIGTERM)


async def _send(
    stop: Stopping,
    options: SessionOptions,
    content: Mapping[str, Any],
    path: Path,
    url: str,
    *,
    policy: Any,
    preset: str,
    calibration: Path | None,
    policy_file: Path | None,
    budget: float | None,
    importance: Any,
    attention: Path | None,
    state: Path | None,
    no_residual: bool,
    request_id: str | None,
    model: str | None,
    revision: str,
) -> int:
    from lynxproto.commands.caches import SUFFIXES, open_cache
    from lynxproto.commands.folder import find_caches
    from lynxproto.commands.progress import Watch, summarize
    from lynxproto.commands.stopping import UNFINISHED
    from lynxproto.session import connect
    from lynxproto.spool import ResumeSecrets

    paths = find_caches(path, SUFFIXES)
    if request_id is not None and len(paths) > 1:
        raise click.UsageError(f"--request-id names one cache; {path} holds {len(paths)}")
    caches = [(one, open_cache(one, model, revision)) for one in paths]  # mistakes show before anything is sent
    mass = None
    if policy_file is None:
        if no_residual or not budget is importance is attention is None:
            raise click.UsageError("--budget, --importance, --attention and --no-residual go with --policy-file")
        chosen = [_policy(policy, preset, calibration, cache) for _, cache in caches]
    else:
        if calibration is not None:
            raise click.UsageError("--policy-file and --calibration exclude each other: a policy file holds widths")
        mass = None if attention is None else _attention(attention)
        tiered = [_tiered(policy_file, budget, importance, mass, cache) for _, cache in caches]
        chosen = [one.anchors_only() if no_residual else one for one in tiered]
    kept = None if state is None else ResumeSecrets(state)
    arguments = options.session(url, content, server=False)
    if policy == "auto":  # one for all: it learns from what they take
        arguments["policy"] = chosen[0]
    with options.recording() as recording, options.measuring() as metrics:
        observe = options.observer(metrics, arguments["config"])
        async with connect(url, **arguments, capture=recording, observe=observe) as session:
            if metrics is not None:
                metrics.watch(session.snapshot)
            for number, ((one, cache), how) in enumerate(zip(caches, chosen, strict=True)):
                if stop.asked.is_set():
                    logs.say(f"{len(caches) - number} of {len(caches)} caches were not sent, from {one} on")
                    return UNFINISHED
                name = request_id or cache.manifest.request_id or one.stem
                manifest, this = replace(cache.manifest, request_id=name), _of_file(one, url, name)
                secret = None if kept is None else kept.secret(*this)
                transfer = session.open(manifest, None if policy == "auto" else how, resume=secret)
                try:
                    async with Watch(transfer, quiet=options.silent):
                        await transfer.send(cache, importance=mass)
                except LynxError:
                    if len(caches) > 1:
                        logs.say(f"{one} was not sent, {len(caches) - number - 1} others after it neither")
                    raise
                if kept is not None:
                    kept.forget(*this)
                summarize("send", transfer, as_json=options.json, path=one)
    return 0


def _of_file(path: Path, url: str, request_id: str) -> tuple[str, ...]:
    """What tells the sending of a file apart from all others; a file that has changed is another."""
    found = path.stat()
    return (str(path.resolve()), str(found.st_size), str(found.st_mtime_ns), url, request_id)


def _policy(policy: Any, preset: str, calibration: Path | None, cache: Cache) -> Policy | AutoPolicy:
    from lynxproto.policy import Policy

    if policy == "lynx" and cache.manifest.dtype not in ("bfloat16", "float16"):  # hq codes no others
        return Policy.progressive(cache.manifest.dtype)
    if policy == "lynx":
        return Policy.lynx(preset, _calibration(calibration, cache))
    if policy == "auto":
        return Policy.auto(_calibration(calibration, cache))
    if calibration is not None:
        raise click.UsageError(f"--calibration is for the policies lynx and auto, not {policy}")
    named = Policy.named(policy)
    if not named.supports(cache.manifest):
        raise ConfigError(f"--policy {policy} cannot code {cache.manifest.dtype}; use lynx, auto or raw")
    return named


def _tiered(path: Path, budget: float | None, importance: Any, attention: Any, cache: Cache) -> Policy:
    """A policy file's policy, if it is of the cache's model."""
    from lynxproto.policy import Policy

    policy = Policy.from_file(path, budget=budget, importance=importance or ("even" if attention is None else None))
    policy.require(cache.manifest.identity)
    if policy.importance == "attention" and attention is None:
        raise click.UsageError("--importance attention needs --attention FILE: dumps do not hold it")
    return policy


def _attention(path: Path) -> Any:
    import numpy as np

    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--attention {path}: no .npy file ({error})") from error
    if array.ndim not in (2, 3) or array.dtype.kind not in "fiu":
        raise ConfigError(f"--attention {path}: must be [layers, kv_heads, tokens] or [layers, tokens] numbers")
    return array


def _calibration(path: Path | None, cache: Cache) -> Calibration | None:
    """The calibration of the cache's model, from a file; another model's is refused."""
    from lynxproto.calibration import Calibration

    if path is None:
        return None
    calibration, identity = Calibration.load(path), cache.manifest.identity
    if (calibration.model, calibration.revision or identity.revision) != (identity.model, identity.revision):
        raise CalibrationError(
            f"{path} was measured on {calibration.model} {calibration.revision}, the cache is of {identity.model}"
            f" {identity.revision}; run `lynxproto calibrate` on the cache's model"
        )
    return calibration
