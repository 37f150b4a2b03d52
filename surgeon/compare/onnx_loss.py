"""An exported model as a module with logits, so that it is evaluated as any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from surgeon.lower.onnx.session import empty_cache, numbered, open_session


class Exported(nn.Module):
    """ONNX Runtime on an exported model; texts in one batch must have one length."""

    def __init__(self, file: Path, config: Any, task: str) -> None:
        super().__init__()
        self.session, self.config, self.task = open_session(file), config, task
        self.inputs = [node.name for node in self.session.get_inputs()]
        self.outputs = [node.name for node in self.session.get_outputs()]
        self.place = nn.Parameter(torch.zeros(1))  # evaluation asks a parameter for its device

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **given: Any) -> ModelOutput:
        """Logits of the texts."""
        ids = input_ids.numpy()
        mask = np.ones_like(ids) if attention_mask is None else attention_mask.numpy().astype(np.int64)
        feed = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": numbered(mask),
            "token_type_ids": np.zeros_like(ids),
            **{name: value.numpy() for name, value in given.items() if isinstance(value, Tensor)},
            **empty_cache(self.session, len(ids)),
        }
        results = self.session.run(None, {name: feed[name] for name in self.inputs})
        named = dict(zip(self.outputs, results, strict=True))
        return ModelOutput({name: torch.from_numpy(named[name]) for name in self.outputs if "present" not in name})
