"""How good predictions are, by torchmetrics where it has the measure. All are shares from 0 to 1, or errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from surgeon.examples import Question
from surgeon.labels import Labels
from surgeon.render_squad import best_answer

Span = tuple[str, int, int]
OUTSIDE = "O"


def classification(predicted: Tensor, right: Tensor, labels: Labels) -> dict[str, float]:
    """Accuracy and macro-averaged F1 of class ids `[n]`; of two classes also the F1 of the second one.

    The macro average is over the classes that occur, among the right ones or the predicted.
    """
    from torchmetrics.functional import classification as torch_metrics

    count = len(labels.names)
    found = {
        "accuracy": float((predicted == right).float().mean()),
        "f1_macro": _macro_f1(predicted, right, count),
    }
    if count == 2:
        found["f1"] = float(torch_metrics.binary_f1_score(predicted, right))
    return found


def _macro_f1(predicted: Tensor, right: Tensor, count: int) -> float:
    from torchmetrics.functional.classification import multiclass_f1_score

    if count < 2:
        return float((predicted == right).float().mean())
    each = multiclass_f1_score(predicted, right, num_classes=count, average="none")
    occurs = torch.zeros(count, dtype=torch.bool).index_fill_(0, torch.cat([predicted, right]), True)
    return float(each[occurs].mean())


def regression(predicted: Tensor, right: Tensor) -> dict[str, float]:
    """Mean squared and absolute error, Pearson's and Spearman's correlation of numbers `[n]`."""
    from torchmetrics import functional

    found = {
        "mse": float(functional.mean_squared_error(predicted, right)),
        "mae": float(functional.mean_absolute_error(predicted, right)),
    }
    if len(right) > 1 and float(right.std()) > 0 and float(predicted.std()) > 0:
        found["pearson"] = float(functional.pearson_corrcoef(predicted, right))
        found["spearman"] = float(functional.spearman_corrcoef(predicted, right))
    return found


def tagging(predicted: Sequence[Sequence[int]], right: Sequence[Sequence[int]], labels: Labels) -> dict[str, float]:
    """Accuracy over tokens, and for BIO names precision, recall and F1 of whole entities, else macro F1 of tokens.

    Each sequence is one sample's tokens that have a label. An entity counts if its type and both ends are right.
    """
    ours = torch.tensor([i for row in predicted for i in row])
    theirs = torch.tensor([i for row in right for i in row])
    found = {"accuracy": float((ours == theirs).float().mean())}
    if not any(name.startswith(("B-", "I-")) for name in labels.names):
        return found | {"f1_macro": _macro_f1(ours, theirs, len(labels.names))}
    guessed, gold, both = 0, 0, 0
    for one, other in zip(predicted, right, strict=True):
        spans = [set(entities([labels.names[i] for i in row])) for row in (one, other)]
        guessed, gold, both = guessed + len(spans[0]), gold + len(spans[1]), both + len(spans[0] & spans[1])
    return found | {
        "precision": both / guessed if guessed else 0.0,
        "recall": both / gold if gold else 0.0,
        "f1": 2 * both / (guessed + gold) if guessed + gold else 0.0,
    }


def entities(tags: Sequence[str]) -> list[Span]:
    """The entities of BIO tags as (type, first, last), as CoNLL's evaluation reads them.

    `B-` begins one; `I-` goes on with one of its own type, and begins one after anything else.
    """
    found: list[Span] = []
    kind, start = "", 0
    for at, tag in enumerate([*tags, OUTSIDE]):
        mark, _, name = tag.partition("-")
        goes_on = mark == "I" and name == kind
        if kind and not goes_on:
            found.append((kind, start, at - 1))
            kind = ""
        if mark in ("B", "I") and not goes_on:
            kind, start = name, at
    return found


def answering(questions: Sequence[Question], starts: Sequence[Tensor], ends: Sequence[Tensor]) -> dict[str, float]:
    """SQuAD's exact match and F1 of the best spans; `starts` and `ends` are the logits `[t]` of all windows.

    Where some questions have no answer, the model may give none, and is right to for those (SQuAD 2).
    """
    from torchmetrics.functional.text import squad

    none = any(not question.answers for question in questions)
    given: list[dict[str, Any]] = []
    wanted: list[dict[str, Any]] = []
    for number, question in enumerate(questions):
        windows = question.windows
        text = best_answer(question, [starts[w] for w in windows], [ends[w] for w in windows], none=none)
        right = list(question.answers) or [""]
        given.append({"prediction_text": text, "id": str(number)})
        wanted.append({"answers": {"answer_start": [0] * len(right), "text": right}, "id": str(number)})
    found = squad(given, wanted)
    return {"exact_match": float(found["exact_match"]) / 100, "f1": float(found["f1"]) / 100}
