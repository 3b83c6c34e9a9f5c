"""vLLM connector: ``--kv-transfer-config`` with ``kv_connector`` LynxConnector and this module's path.

See docs/embedding/vllm.md. Importing this needs vLLM.
"""

from __future__ import annotations

from lynxproto.errors import MissingDependencyError

try:
    from lynxproto.integrations.vllm.connector import LynxConnector
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] not in ("vllm", "torch"):
        raise
    raise MissingDependencyError(
        f"the vLLM connector needs {error.name}; install lynxproto into vLLM's environment"
    ) from error

__all__ = ["LynxConnector"]
