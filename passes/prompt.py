"""Prompt tuning: X' = [P; Emb(x)], P `[tokens, h]` learned, everything else frozen (Lester et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from surgeon.errors import UnsupportedError, UsageError
from surgeon.passes.base import EMBEDDING, Adapter, Cost, Skip

if TYPE_CHECKING:
    import torch

    from surgeon.edit import Edit
    from surgeon.graph import Graph
    from surgeon.sites import Site

TOKENS, PEFT = "tokens", "peft"
ENCODER, DECODER, BOTH = "encoder", "decoder", "both"
_FEW = "fewer --tokens"
# Inits that are drawn, and how.
_DRAWN = {"uniform": "uniform:0.5", "normal": "normal"}


@dataclass(frozen=True)
class Prompt(Adapter):
    """Learned rows before the embedded tokens; lengths, masks, positions and token types follow.

    rows: `[tokens, h]`, where the embedding module returns h numbers per token (Gemma's and BART's scale is part of
    it). Positions count from the prompt's first row, as in PEFT; with left padding the prompt stands before the pads.

    Options:
        tokens: p, the number of rows.
        init: first values. "vocabulary": the embeddings of tokens drawn without replacement from the first 5000 ids,
            the most frequent (the paper's sampled vocabulary); "uniform": U(−0.5, 0.5); "normal": N(0, 1), PEFT's
            default; "text:…": the embeddings of a text, cut or repeated to p; "labels:a|b|c": the embeddings of class
            labels, averaged over the tokens of each, the rest from the vocabulary (the paper's default).
        side: of an encoder-decoder: "encoder" (as in the paper, and what PEFT computes), "decoder" or "both".
        layout: "tokens" cuts the prompt off after the last layer, so that outputs are those of the tokens and poolers
            see the first token; "peft" leaves it in the outputs, `[b, p + t, ..]`, as PEFT does.
    """

    name: ClassVar[str] = "prompt"
    keeps: ClassVar[str] = "changes"
    stacks: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    learning_rate: ClassVar[float] = 3e-2
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    peft_prompt: ClassVar[bool] = True
    folds: ClassVar[bool] = False
    targets: str = "*"
    tokens: int = 20
    init: str = "vocabulary"
    side: str = ENCODER
    layout: str = TOKENS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens <= 0:
            raise UsageError(f"prompt: tokens is {self.tokens}", "--tokens", "at least 1, for example 20")
        if self.init not in ("vocabulary", *_DRAWN) and not self.init.startswith(("text:", "labels:")):
            known = ", ".join(("vocabulary", *_DRAWN, "text:…", "labels:a|b|…"))
            raise UsageError(f"prompt: init is '{self.init}'", "--init", f"one of {known}")
        if self.side not in (ENCODER, DECODER, BOTH):
            raise UsageError(f"prompt: side is '{self.side}'", "--side", f"{ENCODER}, {DECODER} or {BOTH}")
        if self.layout not in (TOKENS, PEFT):
            raise UsageError(f"prompt: layout is '{self.layout}'", "--layout", f"{TOKENS} or {PEFT}")

    def requires(self, graph: Graph) -> None:
        """Raise UsageError for more rows than the model has positions, and for a side that it has not."""
        from surgeon import positions

        if self.side != ENCODER and "decoder_input_ids" not in graph.inputs:
            what = f"prompt: {graph.config.model_type} is no encoder-decoder and has no side '{self.side}'"
            raise UsageError(what, "--side", "leave it out: the rows stand before the tokens")
        limit = positions.limit(graph)
        if limit and self.tokens >= limit:
            what = f"prompt: {self.tokens} virtual tokens leave no room for text"
            raise UsageError(what, f"{graph.config.model_type} has {limit} positions", _FEW)

    def match(self, graph: Graph) -> list[Site | Skip]:
        """The embedding of the tokens, of each side asked for."""
        from surgeon import virtual

        found: list[Site | Skip] = []
        for name in self._inputs(graph):
            site = virtual.token_embedding(graph, name)
            if site is None:
                what = f"prompt: {graph.config.model_type} has no token embedding to stand before"
                raise UnsupportedError(what, name, "the low-rank methods work on every architecture: lora, vera")
            found.append(site)
        return found

    def _inputs(self, graph: Graph) -> list[str]:
        if "decoder_input_ids" not in graph.inputs:
            return ["input_ids"]
        sides = {ENCODER: "input_ids", DECODER: "decoder_input_ids"}
        return [name for side, name in sides.items() if self.side in (side, BOTH)]

    def virtual_tokens(self, graph: Graph) -> dict[str, int]:
        """The rows, of each side asked for."""
        return dict.fromkeys(self._inputs(graph), self.tokens)

    def virtual_outputs(self, graph: Graph) -> int:
        """The rows of the side that the outputs are of, in PEFT's layout."""
        side = "decoder_input_ids" if "decoder_input_ids" in graph.inputs else "input_ids"
        return self.virtual_tokens(graph).get(side, 0) if self.layout == PEFT else 0

    def cost(self, site: Site) -> Cost:
        """tokens · h parameters."""
        count = self.tokens * site.out
        return Cost(trained=count, stored=count)

    def rewrite(self, edit: Edit, site: Site) -> None:
        """cat(rows, y), and everything that counts tokens."""
        from surgeon import virtual

        rows = edit.param("rows", (self.tokens, site.out), _DRAWN.get(self.init, "zeros"))
        virtual.prepend(edit, rows, self.tokens, whole=self.layout == PEFT)

    def initialise(self, graph: Graph, owner: str, seed: int, tokenizer: Any) -> None:
        """Rows of the base's embedding, where the option asks for them."""
        from surgeon import virtual
        from surgeon.first_rows import FirstRows

        for name in [] if self.init in _DRAWN else self._inputs(graph):
            site = virtual.token_embedding(graph, name)
            assert site is not None
            full = site.tensor(owner, "rows")
            graph.inserted[full] = FirstRows(self.init, graph, site, self.tokens, seed, full, tokenizer)

    def rows(self, params: Mapping[str, torch.Tensor], site: Site) -> torch.Tensor:
        """The rows as they are."""
        return params["rows"]

    def params(self, form: Any, site: Site) -> dict[str, torch.Tensor]:
        """The rows as they are."""
        return {"rows": form}

    def peft_config(self, sites: Sequence[Site]) -> dict[str, Any]:
        """PEFT's fields; how the rows were first set no longer matters once they are trained."""
        return {
            "num_virtual_tokens": self.tokens,
            "token_dim": sites[0].out,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": None,
            "tokenizer_name_or_path": None,
            "tokenizer_kwargs": None,
        }

    def peft_unfit(self, task: str) -> str:
        """PEFT prompts encoders, and leaves the rows in what heads see."""
        if self.side != ENCODER:
            return "its rows stand before the tokens of the encoder"
        cut = self.layout == TOKENS and task not in ("causal-lm", "seq2seq-lm")
        return "it leaves the rows in the outputs: layout=peft" if cut else ""

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Prompt:
        """PEFT's fields by surgeon's names; P_TUNING stores the rows its encoder made, and is a prompt like this."""
        whole = config.get("task_type") not in ("CAUSAL_LM", "SEQ_2_SEQ_LM")
        return cls(tokens=int(config["num_virtual_tokens"]), init="normal", layout=PEFT if whole else TOKENS)
