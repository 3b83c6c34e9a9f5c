from lmcache.v1.distributed.serde.async_processor import AsyncSerdeProcessor
from lmcache.v1.distributed.serde.base import Deserializer, SerdeProcessor, Serializer
from lmcache.v1.distributed.serde.factory import (
    create_serde_processor,
    get_registered_serde_types,
    register_serde_factory,
)

__all__ = [
    "AsyncSerdeProcessor",
    "Deserializer",
    "SerdeProcessor",
    "Serializer",
    "create_serde_processor",
    "get_registered_serde_types",
    "register_serde_factory",
]
