"""Opening a model that a user names: a folder of Hugging Face files, a GGUF file, or the demo's model."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lynxproto.demo.model import MODEL, load_model, load_tokenizer, prepare_model
from lynxproto.errors import ConfigError

__all__ = ["OpenedModel", "open_model", "use_threads"]

_WEIGHTS = ("*.safetensors", "*.bin")
_HEAD_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A causal language model in float32, its tokenizer, and what to call it in an Identity."""

    model: Any
    tokenizer: Any
    name: str
    revision: str


def open_model(source: str) -> OpenedModel:
    """Load ``source``: a folder with config.json, a .gguf file, or the name of the demo's model.

    The revision is a hash: of a GGUF file's bytes, or of a folder's config and the heads of its weight files.

    Raises :class:`~lynxproto.errors.ConfigError` when it is none of these, or does not load as a causal model.
    """
    path = Path(source)
    if source == MODEL and not path.exists():
        folder, revision = prepare_model()
        return OpenedModel(load_model(folder), load_tokenizer(folder), MODEL, revision)
    if not (path.is_file() and path.suffix == ".gguf") and not (path / "config.json").is_file():
        raise ConfigError(f"{source!r} is neither a folder with config.json, nor a .gguf file, nor {MODEL}")
    try:
        if path.suffix == ".gguf":
            return _open_gguf(path)
        return OpenedModel(load_model(path), load_tokenizer(path), path.resolve().name, _folder_revision(path))
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # what transformers raises for broken files
        raise ConfigError(f"{source} does not load as a causal language model: {error}") from error


def use_threads(count: int | None) -> None:
    """Let torch use ``count`` CPU threads in this process; None leaves it as it is. Call it before torch is loaded.

    Threads that wait for each other sleep: on a machine that does other work too, spinning doubles the time of a run.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when OpenMP starts
    if count is not None:
        import torch

        torch.set_num_threads(count)


def _open_gguf(path: Path) -> OpenedModel:
    import torch
    import transformers

    with path.open("rb") as file:
        revision = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return OpenedModel(model, tokenizer, path.stem, revision)


def _folder_revision(folder: Path) -> str:
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for weights in sorted(file for pattern in _WEIGHTS for file in folder.glob(pattern)):
        digest.update(f"{weights.name} {weights.stat().st_size}\n".encode())
        with weights.open("rb") as file:
            digest.update(file.read(_HEAD_BYTES))
    return digest.hexdigest()[:16]
