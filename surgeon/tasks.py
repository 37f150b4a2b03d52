"""The tasks surgeon captures models for: which auto class builds them, what goes in, what comes out."""

from __future__ import annotations

from dataclasses import dataclass

from surgeon.errors import UnsupportedError, UsageError, nearest


@dataclass(frozen=True)
class Task:
    """One kind of model.

    Attributes:
        name: as written on the command line.
        auto_class: the transformers auto class that builds it.
        suffixes: endings of the class names in `config.architectures` that mean this task.
        outputs: fields of the model's output that the graph returns, where the model has them.
        required: those without which it is not this task.
    """

    name: str
    auto_class: str
    suffixes: tuple[str, ...]
    outputs: tuple[str, ...]
    required: tuple[str, ...]


_LOGITS = ("logits",)
_SPANS = ("start_logits", "end_logits")
_STATES = ("last_hidden_state", "pooler_output", "encoder_last_hidden_state")

TASKS = {
    task.name: task
    for task in (
        Task("causal-lm", "AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel"), _LOGITS, _LOGITS),
        Task("seq2seq-lm", "AutoModelForSeq2SeqLM", ("ForConditionalGeneration",), _LOGITS, _LOGITS),
        Task(
            "sequence-classification",
            "AutoModelForSequenceClassification",
            ("ForSequenceClassification",),
            _LOGITS,
            _LOGITS,
        ),
        Task("token-classification", "AutoModelForTokenClassification", ("ForTokenClassification",), _LOGITS, _LOGITS),
        Task("question-answering", "AutoModelForQuestionAnswering", ("ForQuestionAnswering",), _SPANS, _SPANS),
        Task("multiple-choice", "AutoModelForMultipleChoice", ("ForMultipleChoice",), _LOGITS, _LOGITS),
        Task("features", "AutoModel", ("Model",), _STATES, ("last_hidden_state",)),
    )
}


def find_task(name: str | None, architectures: list[str] | None, where: str) -> Task:
    """The named task, or the one that the config's architecture says.

    Raises:
        UsageError: the name is unknown.
        UnsupportedError: the architecture names no task surgeon has.
    """
    if name is not None:
        if name not in TASKS:
            raise UsageError(f"unknown task '{name}'", where, f"nearest: {nearest(name, TASKS)}")
        return TASKS[name]
    for architecture in architectures or []:
        for task in TASKS.values():
            if architecture.endswith(task.suffixes):
                return task
    if not architectures:
        return TASKS["causal-lm"]
    raise UnsupportedError(
        f"no task for architecture {architectures[0]}", where, f"name one with --task: {', '.join(TASKS)}"
    )
