"""P-Tuning v2: a prefix at every layer of an encoder, trained with a classification head (Liu et al. 2022)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from surgeon.errors import UsageError
from surgeon.passes.prefix import Prefix

if TYPE_CHECKING:
    from surgeon.graph import Graph

OF_MODEL = -1.0
_DROPOUTS = ("hidden_dropout_prob", "hidden_dropout", "dropout", "resid_pdrop", "dropout_rate")


@dataclass(frozen=True)
class PTuningV2(Prefix):
    """Learned keys and values before those of the tokens at every attention, and the task's head trained beside them.

    softmax(q [P_k; k]ᵀ) [P_v; v] with k: `[h, tokens, d]`, v: `[h, tokens, d]` per layer, 2 · layers · tokens · hidden
    numbers, for classifiers of sequences and of tokens, question answering and multiple choice. Columns have no
    outputs. The head is found by the task and put into `modules_to_save`; its own dropout is the model's. A language
    model keeps its own head, frozen.

    Published lengths are below 20 for simple classification and about 100 for labels of tokens; the default 16 lies
    between, where the reference code has 4 and its scripts 4 to 224. High learning rates are meant: 5e-3 to 6e-2.

    Options:
        tokens: p, the number of columns.
        dropout: on the columns, while training; below 0: the model's own hidden dropout, as in the reference code.
        sites: which attentions: "encoder", "decoder" (over their own tokens), "cross" (over an encoder's states).
    """

    name: ClassVar[str] = "ptuning_v2"
    learning_rate: ClassVar[float] = 5e-3
    tokens: int = 16
    dropout: float = OF_MODEL
    sites: str = "encoder,decoder"

    def __post_init__(self) -> None:
        if self.dropout != OF_MODEL:
            super().__post_init__()
        else:
            dataclasses.replace(self, dropout=0.0)  # checks the other options

    def fitted(self, graph: Graph) -> PTuningV2:
        """With the task's head among `modules_to_save`, and the model's dropout; a language model has no head to train.

        Raises:
            UsageError: the model has no task: there is nothing to train for.
        """
        from surgeon.heads import HEADED, head_modules

        if graph.task == "features":
            what = f"{self.name} trains for a task, and a model for {graph.task} has none"
            hint = f"--task, one of {', '.join(HEADED)}, causal-lm, seq2seq-lm; or --method prefix, which needs none"
            raise UsageError(what, graph.source, hint)
        saved = self.saving(graph, (*graph.fresh, *head_modules(graph))).modules_to_save
        dropout = self.dropout if self.dropout != OF_MODEL else _dropout_of(graph)
        return dataclasses.replace(self, modules_to_save=saved, dropout=dropout)


def _dropout_of(graph: Graph) -> float:
    config = graph.config.get_text_config()
    found = (getattr(config, name, None) for name in _DROPOUTS)
    return next((float(value) for value in found if isinstance(value, (int, float)) and 0 <= value < 1), 0.0)
