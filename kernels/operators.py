"""Kernels as operators `torch.ops.surgeon.*`: one node for capture, export and a saved graph.

They are `torch.library.custom_op`s with a kernel for the CPU and one for fake tensors, not `triton_op`s: those break
export under the interpreter, and AOTInductor and inductor on a CPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch


def operator(schema: str, launch: Callable[..., Any], reference: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """`torch.ops.surgeon.<name>`; what it changes has a `(a!)` in the schema, and no result is a view of an argument.

    Args:
        schema: "name(Tensor x, int n) -> Tensor"; the functions take the arguments in its order.
        launch: on a GPU.
        reference: on a CPU.
        fake: gives results of the right shape and dtype, without values.
    """
    name, _, rest = schema.partition("(")
    changed = re.findall(r"Tensor\(\w+!\) (\w+)", rest)
    made = torch.library.custom_op(f"surgeon::{name}", launch, mutates_args=changed, schema=f"({rest}")
    made.register_kernel("cpu")(reference)
    made.register_fake(fake)
    return made
