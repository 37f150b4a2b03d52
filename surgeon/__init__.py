"""surgeon: adapt transformer models by rewriting their graph, and ship what comes out.

    import surgeon

    surgeon.plan("model/", "vera")                       # what it would cost, from config.json alone
    model = surgeon.apply("model/", "lora", rank=16)     # a model that trains and generates
    model.save("work/")
    surgeon.load("work/").generate(input_ids)
    surgeon.merge("work/", "merged/")
    surgeon.quantise("merged/", "quantised/", "nf4")
    surgeon.export("work/", "onnx/", target="onnx")
    surgeon.verify("work/", "merged/")

Importing this package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from surgeon.remote_code import trust_remote_code

if TYPE_CHECKING:
    from surgeon.api import apply, export, load, merge, plan, quantise, verify

__all__ = ["apply", "export", "load", "merge", "plan", "quantise", "trust_remote_code", "verify"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from surgeon import api

        return getattr(api, name)
    raise AttributeError(f"module 'surgeon' has no attribute '{name}'")
