"""A graph as a Hugging Face citizen: keyword inputs, `.loss`, `.logits`, `.generate`, checkpointing, saving."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import ModelOutput

from surgeon import module, numbering, positions, virtual
from surgeon.errors import UnsupportedError, UsageError, nearest
from surgeon.graph import Graph
from surgeon.head import find_head
from surgeon.loss import causal_cross_entropy, linear_cross_entropy
from surgeon.task_loss import task_loss

_IGNORED = {
    "return_dict",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "num_items_in_batch",
    "cache_position",
}


@dataclasses.dataclass
class Output(ModelOutput):
    """The loss, if labels were given, and the graph's outputs by name.

    After a loss the logits are computed when they are asked for, not before: training never needs them.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    start_logits: torch.Tensor | None = None
    end_logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    encoder_last_hidden_state: torch.Tensor | None = None

    def __getattribute__(self, name: str) -> Any:
        if name == "logits":
            later = object.__getattribute__(self, "__dict__").get("_later")
            if later is not None:
                return later()
        return super().__getattribute__(name)


class SurgeonModel(module.GraphModule):
    """A captured, possibly rewritten model that trains and generates as a Hugging Face model does."""

    main_input_name = "input_ids"
    supports_gradient_checkpointing = True

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.config = graph.config
        self.tokenizer: Any = None

    def forward(self, labels: torch.Tensor | None = None, **inputs: Any) -> Output:  # type: ignore[override]
        """The model on tensors by name; with `labels` the loss of the task.

        Missing masks are all ones, missing positions those of `surgeon.numbering`, missing decoder inputs the labels
        shifted right. Labels are for the tokens, whatever the outputs have before theirs. For causal models they are
        shifted inside, and the logits `[b, t, vocab]` are never held for the loss.

        Raises:
            UsageError: an input the model does not have, none of those it needs, or positions virtual tokens shift.
        """
        count = inputs.pop("num_items_in_batch", None)
        known = {name: value for name, value in inputs.items() if value is not None and name not in _IGNORED}
        spans: dict[str, Any] = {
            name: known.pop(name) for name in ("start_positions", "end_positions") if name in known
        }
        given = self._filled(known, labels)
        labels, spans = virtual.moved(self.graph, labels, spans)
        if labels is None and not spans:
            return Output(**dict(zip(self.graph.outputs, self.run(self.graph.trunk, *given), strict=True)))
        if self.graph.task in ("causal-lm", "seq2seq-lm"):
            return self._language_loss(given, labels, count)
        results = dict(zip(self.graph.outputs, self.run(self.graph.trunk, *given), strict=True))
        targets = spans if labels is None else {"labels": labels, **spans}
        return Output(loss=task_loss(self.graph.task, results, targets, self.config, count), **results)

    def _language_loss(self, given: list[torch.Tensor], labels: torch.Tensor | None, count: Any) -> Output:
        head = find_head(self.graph)
        loss = causal_cross_entropy if self.graph.task == "causal-lm" else linear_cross_entropy
        assert labels is not None
        if head is None:
            results = dict(zip(self.graph.outputs, self.run(self.graph.trunk, *given), strict=True))
            return Output(loss=_logit_loss(results["logits"], labels, self.graph.task, count), **results)
        hidden = self.run(head.body, *given)[0]
        weight = self.get_parameter(head.weight)
        bias = self.get_parameter(head.bias) if head.bias else None
        flat = (
            (hidden, weight, bias, labels)
            if self.graph.task == "causal-lm"
            else (hidden.flatten(0, -2), weight, bias, labels.flatten())
        )
        own = (self.get_buffer(head.index), head.own(self)) if head.rows else None
        scale = None if head.scale == 1 else head.scale
        value = loss(*flat, softcap=head.softcap or None, scale=scale, num_items=count, replaced=own)
        output = Output(loss=value)
        object.__setattr__(output, "_later", lambda: head.logits(self, hidden))
        return output

    def _filled(self, given: dict[str, Any], labels: torch.Tensor | None) -> list[torch.Tensor]:
        """The graph's inputs in order, with what users may leave out."""
        names = self.graph.inputs
        unknown = [name for name in given if name not in names and name not in ("position_ids", "token_type_ids")]
        if unknown:
            raise UsageError(
                f"the model has no input '{unknown[0]}'", ", ".join(names), f"nearest: {nearest(unknown[0], names)}"
            )
        if "decoder_input_ids" in names and "decoder_input_ids" not in given and labels is not None:
            given["decoder_input_ids"] = shifted_right(labels, self.config)
        ids = given.get("decoder_input_ids", given.get("input_ids"))
        if ids is not None:
            positions.check(self.graph, ids.shape[-1], given.get("position_ids"))
            positions.check_source(self.graph, given.get("input_ids", ids).shape[-1])
        for name in names:
            if name not in given:
                given[name] = self._default(name, given)
            elif name == "position_ids":
                given[name] = given[name].expand(given["input_ids"].shape[0], -1)
                self._check_positions(given[name], given)
        return [given[name] for name in names]

    def _check_positions(self, chosen: torch.Tensor, given: Mapping[str, Any]) -> None:
        if virtual.count(self.graph) and not torch.equal(chosen, self._default("position_ids", given)):
            raise UsageError(
                "these positions do not count on from the virtual tokens in front of the text", "position_ids",
                "leave them out; texts packed into one row need a row each",
            )  # fmt: skip

    def _default(self, name: str, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        ids = given.get("decoder_input_ids" if name.startswith("decoder_") else "input_ids")
        if ids is None:
            raise UsageError(f"the input '{name}' is missing", ", ".join(self.graph.inputs), "give input_ids")
        if name.endswith("attention_mask"):
            return torch.ones_like(ids)
        if name == "position_ids":
            mask = given.get("attention_mask", torch.ones_like(ids))
            return numbering.default(self.graph, mask, ids, virtual=virtual.count(self.graph))
        if name == "token_type_ids":
            return torch.zeros_like(ids)
        raise UsageError(f"the input '{name}' is missing", ", ".join(self.graph.inputs), f"give {name}")

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
        """Recompute each layer in the backward pass instead of keeping its activations."""
        for layer in self.layer_modules():
            layer.checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        for layer in self.layer_modules():
            layer.checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any layer recomputes its activations."""
        return any(layer.checkpointing for layer in self.layer_modules())

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.model_device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base model's parameters."""
        return self.model_dtype

    def trained(self) -> Graph:
        """The graph with the tensors of this module in place of the first values of what passes inserted."""
        graph = self.graph.copy()
        state: dict[str, torch.Tensor] = dict(self.named_parameters())
        state.update(self.named_buffers())
        for name in graph.inserted:
            graph.inserted[name] = _Held(state[name].detach())
        return graph

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor | None = None, **options: Any) -> Any:
        """Hugging Face's `generate`, over the graph with a K/V cache; see `surgeon.generate`."""
        from surgeon.generate import generator

        if self.graph.task not in ("causal-lm", "seq2seq-lm"):
            raise UnsupportedError(f"a model for {self.graph.task} does not generate", str(self.graph.source))
        return generator(self).generate(input_ids, **options)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the work folder: what was applied to which base, and the adapter in PEFT's format."""
        from surgeon import store

        return store.save(self.trained(), folder, overwrite=overwrite)


@dataclasses.dataclass(frozen=True)
class _Held:
    tensor: torch.Tensor

    def __call__(self) -> torch.Tensor:
        return self.tensor


def load_model(graph: Graph, **options: Any) -> SurgeonModel:
    """A graph with values as a model; options are those of `surgeon.module.load`."""
    model = SurgeonModel(graph)
    module.load(graph, into=model, **options)
    return model


def shifted_right(labels: torch.Tensor, config: Any) -> torch.Tensor:
    """Decoder inputs for labels `[b, t]`: the start token, then the labels without the last."""
    start = getattr(config, "decoder_start_token_id", None)
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    first = start if start is not None else (config.bos_token_id if config.bos_token_id is not None else pad)
    shifted = torch.nn.functional.pad(labels, (1, 0), value=first)[:, :-1]
    return shifted.masked_fill(shifted == -100, pad)


def _logit_loss(logits: torch.Tensor, labels: torch.Tensor, task: str, count: Any) -> torch.Tensor:
    """Cross-entropy of logits, for heads that are not one linear (an adapter on the head)."""
    if task == "causal-lm":
        labels = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    return total / (count if count is not None else (labels != -100).sum().clamp(min=1))
