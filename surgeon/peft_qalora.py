"""Which QA-LoRA a PEFT-style adapter folder is: the shape of A says it, whatever the config says.

Three codes write folders alike that mean other numbers (a over sums of `group` inputs, in / group = L sums):

    A `[r, L]`, no flag           the paper's code: it pools by the mean, so B A is 1 / group of what it is over sums
    A `[r, L]`, use_qalora        PEFT over GPTQ layers: mean times L, so L / group
    A `[r, in]`, use_qalora       PEFT over other layers, where it ignores the flag: plain LoRA
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from surgeon.errors import UsageError
from surgeon.graph import Graph
from surgeon.passes.lora import Lora
from surgeon.passes.qalora import QaLora
from surgeon.sites import CONV1D, LINEAR, sites

_A = "base_model.model.{}.lora_A.weight"


def pooled_group(graph: Graph, tensors: Mapping[str, torch.Tensor], where: str) -> int:
    """Inputs per sum that the A of an adapter read; 1 where they read the inputs as they are, 0 if there is no A.

    Raises:
        UsageError: they read sums of several sizes.
    """
    found: dict[int, str] = {}
    for site in sites(graph, LINEAR, CONV1D):
        a = tensors.get(_A.format(site.path))
        if a is not None and a.ndim == 2 and a.shape[1] and not site.inp % a.shape[1]:
            found[site.inp // a.shape[1]] = site.path
    if len(found) > 1:
        each = ", ".join(f"{group} at {path}" for group, path in sorted(found.items()))
        raise UsageError(f"its A read groups of several sizes: {each}", where, "name its own base with --base")
    return next(iter(found), 0)


def resolved(graph: Graph, method: type[Any], config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    """The method, config and pass options that the tensors ask for: `(method, config, {option: value})`."""
    if method not in (Lora, QaLora):
        return method, config, {}
    group = pooled_group(graph, tensors, "adapter_model.safetensors")
    if method is QaLora and group == 1:
        return Lora, {**config, "use_qalora": False}, {}
    if method is Lora and group > 1:
        return QaLora, config, {"pool": "mean", "group": group}
    return method, config, {}
