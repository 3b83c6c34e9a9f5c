"""docs/embedding/transformers.md: its code runs, and its two programs work on a model from a folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tinymodels import prompt, tiny, torch, transformers

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "transformers"
PAGE = (ROOT / "docs" / "embedding" / "transformers.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen." * 3


def test_the_page_shows_the_programs() -> None:
    assert BLOCKS[:2] == [(EXAMPLES / f"{name}.py").read_text() for name in ("prefill", "decode")]


def test_the_pages_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": tiny("gemma3", "bfloat16"), "input_ids": prompt(120)}
    for number, block in enumerate(BLOCKS[2:]):
        exec(compile(block, f"transformers.md, block {number + 3}", "exec"), names)
    assert "prefilling here" in capsys.readouterr().out
    assert names["output"].tolist() == names["text"].tolist()
    assert torch.equal(names["again"].layers[0].keys, names["cache"].layers[0].keys)
    assert {path.name for path in tmp_path.iterdir()} == {"prompt.safetensors", "row-0.safetensors"}


def save_model(folder: Path) -> Any:
    """A small model whose tokens are characters, as from_pretrained finds it."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = {chr(code): code - 32 for code in range(32, 127)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    tiny("llama", "bfloat16").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval(), tokenizer


def test_two_processes(tmp_path: Path) -> None:
    model, tokenizer = save_model(tmp_path / "model")
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert ids.shape[1] == len(TEXT)
    expected = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]

    alike = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many threads as here: others round otherwise

    def command(name: str, url: str) -> list[str]:
        return [sys.executable, str(EXAMPLES / f"{name}.py"), str(tmp_path / "model"), url, TEXT]

    with subprocess.Popen(
        command("decode", "tcp://127.0.0.1:0"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=alike
    ) as decode:
        try:
            assert decode.stdout is not None
            line = decode.stdout.readline()
            assert line.startswith("listening on tcp://"), decode.communicate()
            prefill = subprocess.run(
                command("prefill", line.split()[-1]),
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
                env=alike,
            )
            assert prefill.returncode == 0, prefill.stderr
            assert f"sent {len(TEXT)} tokens' cache" in prefill.stdout
            out, err = decode.communicate(timeout=60)
        finally:
            decode.kill()
    assert decode.returncode == 0, err
    assert out == tokenizer.decode(expected) + "\n"
    assert "drafts" in err
