"""LMCache's MemoryObj, as far as serdes and adapters look at it: bytes, and tensors that are views of them."""

from __future__ import annotations

import ctypes
import math

import torch


class Chunk:
    """Memory of groups of ``shapes`` and ``dtypes``; ``seed`` fills it with values as in a cache."""

    def __init__(self, shapes, dtypes, seed=None):
        self._shapes, self._dtypes = [torch.Size(shape) for shape in shapes], list(dtypes)
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
        self._starts = [sum(sizes[:place]) for place in range(len(sizes) + 1)]
        self.raw_data = torch.zeros(self._starts[-1], dtype=torch.uint8)
        if seed is not None:
            random = torch.Generator().manual_seed(seed)
            for index, shape in enumerate(self._shapes):
                values = torch.randn(shape, generator=random) * torch.randn(shape[-1], generator=random).exp()
                self.get_tensor(index).copy_(values.to(dtypes[index]))

    @classmethod
    def of_bytes(cls, count):
        return cls([(count,)], [torch.uint8])

    def get_shapes(self):
        return self._shapes

    def get_dtypes(self):
        return self._dtypes

    def get_tensor(self, index):
        part = self.raw_data[self._starts[index] : self._starts[index + 1]]
        return part.view(self._dtypes[index]).view(self._shapes[index])

    @property
    def tensor(self):
        return self.get_tensor(0)

    @property
    def byte_array(self):
        """As LMCache makes it: through ctypes, in a format that cannot be cast."""
        kind = ctypes.c_ubyte * self.raw_data.numel()
        return memoryview(kind.from_address(self.raw_data.data_ptr()))
