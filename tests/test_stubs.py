"""What holds stubs of engines to the real packages: it must find each difference that an adapter would stumble over."""

from __future__ import annotations

import ast

import pytest
from engines.check_stubs import differences

REAL = """
@dataclass
class Config:
    rank: int
    name: Optional[str] = None

class Kind(str, Enum):
    A = "a"
    B = "b"

class Store(ABC):
    def put(self, keys: List[str], *, size: "int" = 1) -> Optional[bool]: ...
    @abstractmethod
    async def get(self, key): ...
    @property
    def used(self) -> int: ...

def register(name: str, factory: Callable[[dict], "Store"]) -> None: ...
"""
STUB = """
@dataclass
class Config:
    rank: int
    name: str | None = None

class Kind(str, Enum):
    A = "a"

class Store(ABC):
    def put(self, keys: list[str], *, size: int = 1) -> bool | None:
        return True
    @abstractmethod
    async def get(self, key): ...

def register(name: str, factory: Callable[[dict], Store]) -> None: ...
"""


def found(stub):
    return list(differences("", ast.parse(stub).body, ast.parse(REAL).body))


def test_a_faithful_stub_passes():
    assert found(STUB) == []


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("keys: list[str]", "keys: list[int]", "Store.put"),
        ("size: int = 1", "size: int = 2", "Store.put"),
        ("*, size", "size", "Store.put"),
        ("def put(self, keys", "def put(self, names", "Store.put"),
        ("bool | None:", "bool:", "Store.put"),
        ("async def get", "def get", "Store.get"),
        ("@abstractmethod", "@property", "Store.get"),
        ("get(self, key)", "fetch(self, key)", "Store.fetch"),
        ("class Store", "class Other", "Other"),
        ("@dataclass", "@dataclass(frozen=True)", "Config"),
        ("    rank: int\n", "", "Config"),
        ("= None", "= ''", "Config"),
        ('A = "a"', 'A = "b"', "Kind"),
        ("factory: Callable[[dict], Store]", "factory: Callable", "register"),
        ("def register", "def unregister", "unregister"),
    ],
)
def test_differences_are_named(old, new, name):
    assert old in STUB
    messages = found(STUB.replace(old, new))
    assert messages
    assert all(message.startswith(name) for message in messages)
