"""A tiny encoder of no library: convolutions of every sort over tokens, and torch's own multi-head attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class OddConfig(PretrainedConfig):
    """Its sizes are fixed, but for the number of layers."""

    model_type = "odd"

    def __init__(self, num_hidden_layers: int = 2, vocab_size: int = 112, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_hidden_layers, self.vocab_size = num_hidden_layers, vocab_size
        self.hidden_size, self.num_attention_heads = 32, 4


class OddLayer(nn.Module):
    """Convolutions over tokens (plain, in groups, dilated), one over tokens and features, and an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv1d(32, 32, 3, padding=1)
        self.grouped = nn.Conv1d(32, 48, 3, padding="same", groups=4)
        self.dilated = nn.Conv1d(48, 32, 3, padding=2, dilation=2, bias=False)
        self.plane = nn.Conv2d(1, 6, (3, 5), stride=(1, 2), padding=(1, 2))
        self.point = nn.Conv2d(6, 2, 1)
        self.norm = nn.LayerNorm(32)
        self.attend = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """`[b, t, 32]` → `[b, t, 32]`."""
        y = self.plain(x.transpose(1, 2))
        y = self.dilated(torch.tanh(self.grouped(torch.tanh(y))))
        x = x + torch.tanh(y).transpose(1, 2)
        seen = self.point(torch.tanh(self.plane(x[:, None])))
        x = x + seen.transpose(1, 2).flatten(2)
        y = self.norm(x)
        attended, _ = self.attend(y, y, y, need_weights=False)
        return x + attended


class OddModel(PreTrainedModel):
    """Layers of these over embedded tokens."""

    config_class = OddConfig
    _supports_sdpa = True

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, 32)
        self.layers = nn.ModuleList([OddLayer() for _ in range(config.num_hidden_layers)])
        self.post_init()

    def forward(self, input_ids: Tensor, return_dict: bool = True, **_: Any) -> BaseModelOutput:
        """Token ids → hidden states."""
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return BaseModelOutput(last_hidden_state=x)


AutoConfig.register(OddConfig.model_type, OddConfig)
AutoModel.register(OddConfig, OddModel)
