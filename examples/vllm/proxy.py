"""A proxy in front of a prefill and a decode instance of vLLM, as small as it can be.

Each request goes to the prefill instance for one token, and then, with the kv_transfer_params that it answered, to the
decode instance. Needs aiohttp, which vLLM brings.

    python proxy.py --prefill http://127.0.0.1:8101 --decode http://127.0.0.1:8102 --kv tcp://127.0.0.1:14579
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from aiohttp import ClientSession, ClientTimeout, web

PATHS = ("/v1/completions", "/v1/chat/completions")
#: Of an answer or a request: belongs to one hop.
HOP = {"content-length", "transfer-encoding", "connection", "host"}


async def forward(request: web.Request) -> web.StreamResponse:
    app = request.app
    body: dict[str, Any] = await request.json()
    headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP}
    asked = body.pop("kv_transfer_params", None) or {}
    hand_over = {"do_remote_decode": True, "do_remote_prefill": False, "remote_urls": app["kv"]}
    first = body | {"stream": False, "max_tokens": 1, "kv_transfer_params": asked | hand_over}
    first.pop("stream_options", None)
    first.pop("max_completion_tokens", None)
    session: ClientSession = app["session"]
    began = time.monotonic()
    async with session.post(app["prefill"] + request.path, json=first, headers=headers) as answer:
        if answer.status != 200:
            return web.Response(status=answer.status, body=await answer.read(), content_type=answer.content_type)
        params = (await answer.json()).get("kv_transfer_params")
    prefilled = time.monotonic() - began
    # Without parameters (an instance without a connector, a prompt that was not sent) decode computes the prompt.
    second = body | ({"kv_transfer_params": asked | params} if params else {})
    async with session.post(app["decode"] + request.path, json=second, headers=headers) as answer:
        response = web.StreamResponse(status=answer.status)
        response.headers.update({n: v for n, v in answer.headers.items() if n.lower() not in HOP})
        response.headers["X-Prefill-Seconds"] = f"{prefilled:.4f}"
        await response.prepare(request)
        async for piece in answer.content.iter_any():
            await response.write(piece)
        await response.write_eof()
        return response


async def health(_: web.Request) -> web.Response:
    return web.Response()


async def sessions(app: web.Application) -> Any:
    app["session"] = ClientSession(timeout=ClientTimeout(total=None))
    yield
    await app["session"].close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefill", required=True, help="the prefill instance's URL")
    parser.add_argument("--decode", required=True, help="the decode instance's URL")
    parser.add_argument(
        "--kv",
        required=True,
        action="append",
        help="where the decode instance receives caches; once for each of its ranks",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8100)
    args = parser.parse_args()
    app = web.Application(client_max_size=64 << 20)
    app.update(prefill=args.prefill, decode=args.decode, kv=args.kv)
    app.cleanup_ctx.append(sessions)
    app.router.add_get("/health", health)
    for path in PATHS:
        app.router.add_post(path, forward)
    web.run_app(app, host=args.host, port=args.port, print=lambda line: print(json.dumps({"proxy": line}), flush=True))


if __name__ == "__main__":
    main()
