"""The pages of an artifact's requests: allocated once for a call of `generate`, learned columns in front.

Pages of columns come first and belong to all requests; then a run of pages for each, so that on a CPU a request's keys
are one slice of the pool. The table of blocks and the number of columns differ between attentions that have columns and
those that have none; the pages of tokens have the same numbers everywhere.
"""

from __future__ import annotations

import math

import torch

from surgeon.artifact.manifest import require_memory
from surgeon.artifact.program import Attention, Program
from surgeon.graph import TensorSpec
from surgeon.kernels.pages import padded
from surgeon.module import GraphModule, place

PAGE = 16


class Cache:
    """Keys and values of some requests, as buffers of the module that runs.

    Args:
        module: whose attentions get the pages.
        program: what it runs.
        requests: how many.
        tokens: the most that any of them will have.
    """

    def __init__(self, module: GraphModule, program: Program, requests: int, tokens: int) -> None:
        self.device, self.dtype = module.model_device, module.model_dtype
        self.each = -(-tokens // PAGE)
        counts = [self._columns(module, one) for one in program.attentions]
        self.front = max((padded(count, PAGE) // PAGE for count in counts), default=0)
        self.pages = self.front + requests * self.each
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            require_memory(self.bytes(program), free, "the cache", program.graph.source)
        for one, count in zip(program.attentions, counts, strict=True):
            self._place(module, one, count, requests)
        table = self.front + torch.arange(requests * self.each).view(requests, self.each)
        slots = (table[:, :, None] * PAGE + torch.arange(PAGE)).flatten(1)
        self.slots = slots.to(self.device)
        """Where each token of each request lies, `[requests, tokens]`."""

    def bytes(self, program: Program) -> int:
        """What the pages take."""
        numbers = sum(one.kv * (one.size + one.width) for one in program.attentions)
        return self.pages * PAGE * numbers * self.dtype.itemsize

    def _columns(self, module: GraphModule, one: Attention) -> int:
        return sum(module.get_parameter(name).shape[1] for name in one.k)

    def _place(self, module: GraphModule, one: Attention, count: int, requests: int) -> None:
        own = f"{one.layer}." if one.layer else ""
        front = padded(count, PAGE) // PAGE
        rest = self.front + torch.arange(requests * self.each).view(requests, self.each)
        blocks = torch.cat([torch.arange(front).expand(requests, -1), rest], 1).to(torch.int32)
        held = {"blocks": blocks, "prefixes": torch.full((requests,), count, dtype=torch.int32)}
        for leaf, names, size in (("k_pages", one.k, one.size), ("v_pages", one.v, one.width)):
            pages = torch.zeros(self.pages, PAGE, one.kv, size, dtype=self.dtype, device=self.device)
            if names:
                columns = torch.cat([module.get_parameter(name) for name in names], 1).transpose(0, 1)
                pages.view(-1, one.kv, size)[:count] = columns.detach().to(self.dtype)
            held[leaf] = pages
        for leaf, tensor in held.items():
            spec = TensorSpec(tuple(tensor.shape), parameter=False, persistent=False)
            place(module, f"{own}{one.name}.{leaf}", tensor.to(self.device), spec)


def weight_bytes(program: Program) -> int:
    """What a program's tensors take."""
    specs = program.graph.tensors.values()
    return sum(math.prod(spec.shape) * (spec.dtype or torch.float32).itemsize for spec in specs)
