"""A prompt as new words of the vocabulary: a plain checkpoint that computes the prompted model, given those words.

Row i of the prompt becomes the embedding of the token `<prompt_i>`. A text that begins with `<prompt_0>…<prompt_{p-1}>`
then gives, in any Hugging Face tool, the logits that the prompted model gives for the rest of it; they come before a
start token too. Nothing learned to predict the new tokens, so generation is told to suppress them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken

from surgeon import fold, virtual
from surgeon.errors import CheckFailed, UnsupportedError
from surgeon.fold import Fold
from surgeon.graph import Graph
from surgeon.lower.hf import write_merged
from surgeon.replaced import Held
from surgeon.sites import CONV1D, EMBEDDING, LINEAR, sites
from surgeon.source import Source, Values, open_graph, open_source
from surgeon.stream import StreamingExecutor
from surgeon.targets import head_paths
from surgeon.verification import make_probes, probe_inputs

MANIFEST = "surgeon.json"
_BOUND = 1e-4  # relative to the largest logit: the order of fp32 sums, nothing else differs
_INSTEAD = "without baking it is an adapter beside the weights"


@dataclass(frozen=True)
class Baked:
    """What was written.

    Attributes:
        folder: the checkpoint.
        tokens: the new words, to be put in front of every text.
        ids: their ids.
        max_error: the largest difference of logits on the probes, relative to the largest logit.
    """

    folder: Path
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    max_error: float


def bake(
    graph: Graph, source: Source, out: str | Path, *, tokenizer: Any = None, base: str = "", overwrite: bool = False
) -> Baked:
    """Write the base of `graph` with its prompt as new vocabulary entries to the folder `out`.

    Args:
        graph: a language model with a prompt and nothing else applied, over the weights of `source`.
        source: the base.
        out: the new folder.
        tokenizer: of the base; gets the new words. Without one they have the ids after the vocabulary.
        base: what to call the base, where that is not `source`.
        overwrite: replace an existing folder.

    Raises:
        UnsupportedError: there is more than one prompt to bake, or it is not one that tokens can stand for.
        CheckFailed: the written checkpoint computes something else; nothing is left behind.
    """
    item = _prompt(graph, out)
    scale, size = _scale(graph, item), item.site.inp
    rows = item.rows().float() / scale
    words = tuple(f"<prompt_{number}>" for number in range(len(rows)))
    ids = _ids(tokenizer, words, size)
    stored, names = _tables(graph, item.site.weight, size)
    extra = {name: _extended(source.checkpoint.read(name), rows if name in stored else None, ids) for name in names}
    errors: list[float] = []

    def check(folder: Path) -> None:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        _suppress(folder, source.checkpoint.config, ids)
        dtype = extra[stored[0]].dtype
        errors.append(_error(graph, item, rows.to(dtype).float() * scale, folder, source, ids, size))
        if errors[0] > _BOUND:
            what = f"not the same function: relative error {errors[0]:.3g}, bound {_BOUND:.0e}"
            raise CheckFailed(what, str(out), "nothing was written; keep the prompt as an adapter")
        passes = [{"name": step.name, "options": step.options()} for step in graph.applied]
        record = {
            "base": base or source.name,
            "passes": passes,
            "baked": asdict(Baked(Path(out), words, ids, errors[0])),
        }
        (folder / MANIFEST).write_text(json.dumps(record, indent=2, default=str) + "\n")

    field = {"vocab_size": max(size, max(ids) + 1)}
    update = {"text_config": field} if "text_config" in source.checkpoint.config else field
    write_merged(
        source.checkpoint, {}, out, extra_tensors=extra, config_update=update, overwrite=overwrite, check=check
    )
    return Baked(Path(out), words, ids, errors[0])


def _prompt(graph: Graph, out: str | Path) -> Fold:
    found = fold.rows(graph)
    if len(found) != 1 or len(graph.applied) != 1:
        names = ", ".join(step.name for step in graph.applied) or "nothing"
        raise UnsupportedError(f"one prompt can be baked into a vocabulary, and {names} is applied", str(out), _INSTEAD)
    if graph.task not in ("causal-lm", "seq2seq-lm"):
        what = f"a model for {graph.task} looks at its first token, which would be the prompt's"
        raise UnsupportedError(what, str(out), _INSTEAD)
    if virtual.count(graph) == 0:
        raise UnsupportedError("a prompt of the decoder stands before its start token", str(out), _INSTEAD)
    return found[0]


def _scale(graph: Graph, item: Fold) -> float:
    """What the embedding's module multiplies its rows by."""
    table = graph.values[item.site.weight].float()
    row = int(table[:64].norm(dim=1).argmax())
    before, after = table[row], virtual.embedded(graph, item.site, torch.tensor([row]))[0]
    scale = float(after @ before / (before @ before))
    if not torch.allclose(after, before * scale, rtol=1e-4, atol=1e-6):
        raise UnsupportedError("the embedding does more than look rows up and scale them", item.site.path, _INSTEAD)
    return scale


def _ids(tokenizer: Any, words: Sequence[str], size: int) -> tuple[int, ...]:
    """The ids of the new words: the tokenizer's next, which a padded table may have rows for, or the table's next."""
    if tokenizer is None:
        return tuple(range(size, size + len(words)))
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in words], special_tokens=True)
    return tuple(tokenizer.convert_tokens_to_ids(list(words)))


def _tables(graph: Graph, table: str, size: int) -> tuple[list[str], list[str]]:
    """The stored names of the embedding, and of everything that has an entry per word."""
    if not isinstance(graph.values, Values):
        raise UnsupportedError("the graph was not read from a checkpoint", graph.source, "open it with surgeon.load")
    weights = graph.values.weights
    head = head_paths(graph)
    per_word = {site.weight for site in sites(graph, EMBEDDING) if site.inp == size}
    for site in sites(graph, LINEAR, CONV1D):
        if site.path in head and site.out == size:
            per_word |= {site.weight, site.bias} - {""}
    per_word |= {name for name in graph.tensors if name.rpartition(".")[2] == "final_logits_bias"}
    named = {**{name: name for name in per_word}, **{a: n for a, n in graph.ties.items() if n in per_word}}
    stored = {weights.direct(name): name for name in named}
    missing = [name for name in per_word if weights.direct(name) is None]
    if missing:
        raise UnsupportedError(f"{missing[0]} is not stored as it is", graph.source, _INSTEAD)
    found = {kept: named[name] for kept, name in stored.items() if kept is not None}
    return [kept for kept, name in found.items() if name == table], list(found)


def _extended(tensor: torch.Tensor, rows: torch.Tensor | None, ids: Sequence[int]) -> torch.Tensor:
    """A stored tensor with entries for the new words: their rows, or zeros for heads and biases of their own."""
    axis = 0 if tensor.dim() == 1 or tensor.shape[0] > 1 else 1
    more = max(0, max(ids) + 1 - tensor.shape[axis])
    shape = list(tensor.shape)
    shape[axis] = more
    result = torch.cat([tensor, tensor.new_zeros(shape)], axis)
    if rows is not None:
        result[torch.tensor(ids)] = rows.to(tensor.dtype)
    return result


def _suppress(folder: Path, config: Any, ids: Sequence[int]) -> None:
    """Tell `generate` never to choose the new words."""
    file = folder / "generation_config.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not found:
        kept = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        found = {name: config[name] for name in kept if config.get(name) is not None}
    found["suppress_tokens"] = [*(found.get("suppress_tokens") or []), *ids]
    file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _error(
    graph: Graph, item: Fold, rows: torch.Tensor, folder: Path, source: Source, ids: Sequence[int], size: int
) -> float:
    """The largest difference of logits, relative to the largest, between the prompted graph and the written folder."""
    prompted = graph.copy()
    prompted.inserted = {**graph.inserted, item.site.tensor(item.owner, "rows"): Held(rows)}
    baked = open_graph(open_source(folder, source.task.name))
    probes = make_probes(graph)
    given = [probe_inputs(graph, probe) for probe in probes]
    expected = StreamingExecutor(prompted).batch(given)
    found = StreamingExecutor(baked).batch([_with_words(baked, inputs, ids) for inputs in given])
    worst = 0.0
    for one, other in zip(expected, found, strict=True):
        wanted = one[0].float()
        difference = other[0].float()[:, -wanted.shape[1] :, :size] - wanted
        worst = max(worst, float(difference.abs().max() / wanted.abs().max()))
    return worst


def _with_words(graph: Graph, inputs: list[torch.Tensor], ids: Sequence[int]) -> list[torch.Tensor]:
    """The inputs of a text with the new words in front."""
    words, result = torch.tensor([list(ids)]), []
    for name, tensor in zip(graph.inputs, inputs, strict=True):
        if name == "input_ids":
            tensor = torch.cat([words, tensor], 1)
        elif name == "attention_mask":
            tensor = virtual.in_front(tensor, len(ids))
        elif name == "position_ids":
            tensor = torch.arange(tensor.shape[1] + len(ids))[None]
        elif name == "token_type_ids":
            tensor = virtual.in_front(tensor, len(ids), 0)
        result.append(tensor)
    return result
