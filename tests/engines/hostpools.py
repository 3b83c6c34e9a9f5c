"""Host pools as SGLang has them (mem_cache/pool_host): the same buffers, layouts and page calls, without a GPU."""

from __future__ import annotations

from typing import Any

import torch

LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")
PAGES = 6


class HostPool:
    """K and V of multi-head attention (``kv=2``), or latents (``kv=1``)."""

    def __init__(
        self, layout="layer_first", *, page_size=16, layers=3, heads=2, dim=16, kv=2, dtype=torch.bfloat16, seed=None
    ):
        self.layout, self.page_size, self.dtype = layout, page_size, dtype
        slots = PAGES * page_size
        dims = {
            "layer_first": (layers, slots, heads, dim),
            "page_first": (slots, layers, heads, dim),
            "page_first_direct": (PAGES, layers, page_size, heads, dim),
            "page_head": (PAGES, heads, page_size, layers, dim),
            "another": (slots, layers * heads * dim),
        }[layout]
        shape = dims if kv == 1 else (2, *dims)
        self.kv_buffer = torch.zeros(shape, dtype=dtype)
        self.size_per_token = kv * layers * heads * dim * dtype.itemsize
        if seed is not None:
            random = torch.Generator().manual_seed(seed)
            values = torch.randn(shape, generator=random) * torch.randn(dim, generator=random).exp().repeat(
                shape[-1] // dim
            )
            self.kv_buffer.copy_(values.to(dtype))
        if kv == 2:
            self.k_buffer, self.v_buffer = self.kv_buffer
        self._kv = kv

    def _page(self, index: int) -> torch.Tensor:
        pages = self.kv_buffer if self._kv == 2 else self.kv_buffer[None]
        if self.layout == "layer_first":
            return pages[:, :, index : index + self.page_size]
        if self.layout in ("page_first", "another"):
            return pages[:, index : index + self.page_size]
        return pages[:, index // self.page_size]

    def get_data_page(self, index, flat: bool = True) -> torch.Tensor:
        page = self._page(int(index))
        return page.flatten() if flat else page

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros_like(self._page(0)).flatten()

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        page = self._page(int(index))
        page.copy_(data_page.reshape(page.shape))

    def indices(self, *pages: int) -> torch.Tensor:
        return torch.cat([torch.arange(p * self.page_size, (p + 1) * self.page_size) for p in pages])


class WithoutPages(HostPool):
    """A pool whose pages cannot be told (scales beside the buffer, for example)."""

    def __init__(self, **kw: Any):
        super().__init__("another", **kw)

    def get_data_page(self, index, flat: bool = True) -> torch.Tensor:
        raise NotImplementedError("no flat pages")

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        raise NotImplementedError("no flat pages")
