"""Text from a graph: Hugging Face's own `generate` over the graph with a K/V cache.

Sampling, beams, stop strings, logits processors and streamers are transformers' code; this file gives it a model whose
forward runs the graph that the `kv_cache` pass makes, on the tensors of an already loaded module.
"""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, Seq2SeqLMOutput

from surgeon import module, numbering, positions, run, virtual
from surgeon.caches import TextCache, read, write
from surgeon.errors import UnsupportedError, UsageError
from surgeon.graph import Graph
from surgeon.head import find_head
from surgeon.module import GraphModule
from surgeon.packed import packed_products
from surgeon.passes import make

_cached: weakref.WeakKeyDictionary[fx.Graph, dict[str, Graph | None]] = weakref.WeakKeyDictionary()


def cached_graph(graph: Graph, phase: str = "both") -> Graph | None:
    """The graph with a K/V cache, made once per graph; None for a model that cannot have one.

    In a step virtual tokens are in the cache, and no longer in the graph.
    """
    known = _cached.setdefault(graph.trunk, {})
    if phase not in known:
        try:
            known[phase] = run.apply(
                virtual.afterwards(graph) if phase == "step" else graph, make("kv_cache", phase=phase)
            )
        except UnsupportedError:
            known[phase] = None
    return known[phase]


def generator(loaded: GraphModule) -> Generator:
    """A Hugging Face model with `.generate(...)`, on the tensors of a loaded module.

    A model that cannot have a cache (recurrent state, attention that is no node) generates by running the whole text
    for every token: the same tokens, slower.

    Raises:
        UsageError: the module's graph is for a task without text.
    """
    graph = loaded.graph
    if graph.task == "causal-lm":
        return CausalGenerator(loaded)
    if graph.task == "seq2seq-lm":
        return Seq2SeqGenerator(loaded)
    raise UsageError(f"a model for {graph.task} does not generate", graph.source or graph.config.model_type)


class Generator(PreTrainedModel, GenerationMixin):
    """What `GenerationMixin` needs of a model; the subclasses run the graphs."""

    main_input_name = "input_ids"
    base_model_prefix = ""
    _supports_sdpa = True

    ids = "input_ids"

    def __init__(self, loaded: GraphModule, *phases: str) -> None:
        config = copy.deepcopy(loaded.graph.config)
        config._attn_implementation = config._experts_implementation = "eager"  # the graph has its own
        super().__init__(config)
        self.generation_config = generation_config(loaded.graph)
        self.virtual = virtual.count(loaded.graph, self.ids)
        graphs = [cached_graph(loaded.graph, phase) for phase in phases]
        self.room = positions.room(loaded.graph)
        self.has_cache = all(graph is not None for graph in graphs)
        found = graphs if self.has_cache else [loaded.graph]
        self.runners = nn.ModuleList(module.rebind(graph, loaded) for graph in found if graph is not None)
        self.eval()

    def can_generate(self) -> bool:
        """It does nothing else."""
        return True

    @torch.no_grad()
    @packed_products()
    def generate(self, *args: Any, **options: Any) -> Any:
        """`transformers.GenerationMixin.generate`."""
        if not self.has_cache:
            options["use_cache"] = False
        return super().generate(*args, **options)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: Any, *_: Any, **__: Any) -> None:
        """A cache that keeps every token: windows are the attention node's own business."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise UsageError(f"cache_implementation '{kind}' is not supported", "generate", "leave it out")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.new_cache()

    def new_cache(self) -> Any:
        """An empty cache."""
        return TextCache(self.virtual)

    def length(self, cache: Any) -> int:
        """How many tokens of the text a cache holds.

        Raises:
            UsageError: it is not `new_cache()`, and would count virtual tokens among them.
        """
        if self.virtual and not isinstance(getattr(cache, "self_attention_cache", cache), TextCache):
            raise UsageError("this cache counts virtual tokens as text", "past_key_values", "model.new_cache()")
        found: int = cache.get_seq_length()
        return found

    def check(self, last: int) -> None:
        """Raise UsageError for a position of the text beyond the model's table."""
        if self.room:
            positions.require(self.room, last, "generate: the text with what was added to it")


class CausalGenerator(Generator):
    """A decoder: one graph for the text and for every token after it, or two if the text begins with virtual tokens."""

    def __init__(self, loaded: GraphModule) -> None:
        super().__init__(loaded, *(("prefill", "step") if virtual.count(loaded.graph) else ("both",)))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `[b, t or logits_to_keep, vocab]` of new tokens after those in the cache, which grows by them.

        A model with virtual tokens numbers the text itself.
        """
        cache = past_key_values if past_key_values is not None else self.new_cache()
        batch, new = input_ids.shape
        past = self.length(cache)
        runner: Any = self.runners[1 if past and self.virtual else 0]
        mask = input_ids.new_ones(batch, past + new) if attention_mask is None else attention_mask
        if position_ids is None or self.virtual:
            position_ids = numbering.default(runner.graph, mask, virtual=self.virtual)[:, past:]
            position_ids = position_ids + (self.virtual if past else 0)
        self.check(int(position_ids.max()) - (self.virtual if past else 0))
        given = {
            "input_ids": input_ids,
            "attention_mask": virtual.in_front(mask, self.virtual if past else 0),
            "position_ids": position_ids.expand(batch, new),
            "token_type_ids": torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids,
            **read(runner, {"": cache}, batch),
        }
        logits, results = _logits(runner, given, logits_to_keep)
        if self.has_cache:
            write(results, {"": cache})
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


class _Deferred(nn.Module):
    """Stands where `generate` looks for an encoder and hands the ids on: the prefill graph runs its encoder itself."""

    main_input_name = "input_ids"

    def forward(self, input_ids: torch.Tensor, **_: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=input_ids)


class Seq2SeqGenerator(Generator):
    """An encoder-decoder: one graph for the source and the first tokens, another for every token after them."""

    ids = "decoder_input_ids"

    def __init__(self, loaded: GraphModule) -> None:
        super().__init__(loaded, "prefill", "step")
        self.virtual_source = virtual.count(loaded.graph)
        self.source = loaded.graph

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        """See `_Deferred`."""
        return _Deferred()

    def new_cache(self) -> Any:
        """Keys and values of the decoder's tokens, and of the encoder's states."""
        return EncoderDecoderCache(TextCache(self.virtual), DynamicCache())

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: EncoderDecoderCache | None = None,
        **_: Any,
    ) -> Seq2SeqLMOutput:
        """Logits `[b, t, vocab]` of new decoder tokens after those in the cache."""
        source = input_ids if input_ids is not None else encoder_outputs[0]
        assert decoder_input_ids is not None
        cache = past_key_values if past_key_values is not None else self.new_cache()
        past = self.length(cache)
        runner: Any = self.runners[1 if past else 0]
        batch, new = decoder_input_ids.shape
        self.check(past + new - 1)
        if not past:
            positions.check_source(self.source, source.shape[1])
        mask = torch.ones_like(source) if attention_mask is None else attention_mask
        if decoder_attention_mask is None:
            decoder_attention_mask = decoder_input_ids.new_ones(batch, past + new)
        parts = {"decoder.": cache.self_attention_cache, "encoder.": cache.cross_attention_cache}
        given = {
            "input_ids": source,
            "attention_mask": virtual.in_front(mask, self.virtual_source if past else 0),
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": virtual.in_front(decoder_attention_mask, self.virtual if past else 0),
            **read(runner, parts, batch),
        }
        logits, results = _logits(runner, given, 0)
        write(results, parts)
        return Seq2SeqLMOutput(logits=logits, past_key_values=past_key_values)


def generation_config(graph: Graph) -> GenerationConfig:
    """The checkpoint's generation_config.json, or what its config says."""
    if graph.source and (Path(graph.source) / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(graph.source)
    return GenerationConfig.from_model_config(graph.config)


def _logits(runner: GraphModule, given: dict[str, Any], keep: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The logits, only of the last `keep` tokens if it is not 0, and every output by name."""
    head = find_head(runner.graph) if keep else None
    trunk = head.body if head else runner.graph.trunk
    outputs = runner.run(trunk, *[given[name] for name in runner.graph.inputs])
    results = dict(zip(runner.graph.outputs, outputs, strict=True))
    last = results["logits"][:, -keep:] if keep else results["logits"]
    return (head.logits(runner, last) if head else last), results
