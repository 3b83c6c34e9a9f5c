"""The Python fuzz targets hold on their seeds and on changes of them; coverage-guided runs are `make fuzz`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from random import Random

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.seeds import write_seeds

_ROUNDS = {"frames": 400, "connection": 40, "codecs": 40, "capture": 150, "objects": 100}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    write_seeds(folder)
    return folder


@pytest.mark.parametrize("target", _ROUNDS)
def test_target_holds_on_seeds_and_their_neighbours(target: str, seeds: Path) -> None:
    run = importlib.import_module(f"fuzz.targets.{target}").run
    random = Random(target)
    inputs = [path.read_bytes() for path in sorted((seeds / target).iterdir()) if path.stat().st_size]
    assert inputs
    for _ in range(_ROUNDS[target]):
        data = bytearray(random.choice(inputs))
        run(bytes(data))
        for _ in range(random.randrange(4)):
            data[random.randrange(len(data))] = random.randrange(256)
        run(bytes(data[: random.randrange(len(data) + 1)]))
