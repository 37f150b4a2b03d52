"""The way back: what a parameter's new value, or a change of it, means for the tensors it is stored in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers.core_model_loading import rename_source_key

from surgeon.errors import UnsupportedError
from surgeon.weights import ModelWeights


def stored_parts(weights: ModelWeights, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameter name → tensor of its shape, turned into checkpoint name → tensor of the stored shape.

    Conversions (stacking experts, joining or splitting projections, transposing) move values and never compute with
    them, so this holds for values and equally for differences. Where the stored tensor is also the source of
    parameters that are not in `values`, those parts are zero: pass all of a group's `siblings`, or a difference.
    Raises UnsupportedError for a parameter that is not stored, or whose conversion transformers cannot revert.
    """
    parts: dict[str, torch.Tensor] = {}
    done: set[str] = set()
    for name, value in values.items():
        if name in done:
            continue
        direct = weights.direct(name)
        if direct is not None:
            parts[direct] = value
        elif weights.sources(name):
            group = {
                sibling: values.get(sibling, torch.zeros(weights.shape(sibling), dtype=value.dtype))
                for sibling in weights.siblings(name)
            }
            parts.update(_reverted(weights, name, group))
            done.update(group)
        else:
            raise UnsupportedError(f"{name} is not stored in the checkpoint", str(weights.checkpoint.folder))
    return parts


def _reverted(weights: ModelWeights, name: str, group: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    back, first = weights.converter(name).reverse_transform(), ""
    for parameter, value in group.items():
        renamed, pattern = back.rename_source_key(parameter)
        first = first or renamed
        back.add_tensor(renamed, parameter, pattern, value)
    found = back.convert(first, model=weights.model, config=weights.model.config)
    intermediate = {rename_source_key(source, weights.renamings, [])[0]: source for source in weights.sources(name)}
    parts = {}
    for key, value in found.items():
        source = _matching(key, intermediate, weights.model.base_model_prefix)
        tensor = value[0] if isinstance(value, list) else value
        if source is None or tuple(tensor.shape) != weights.checkpoint.info(source).shape:
            what = f"the conversion of {name} cannot be reverted ({key} is not stored)"
            raise UnsupportedError(what, str(weights.checkpoint.folder), "leave this parameter out of the targets")
        parts[source] = tensor
    return parts


def _matching(key: str, stored: Mapping[str, str], prefix: str) -> str | None:
    # The prefix of the base model may have been added or removed when the tensor was named.
    for candidate in (key, f"{prefix}.{key}", key.removeprefix(f"{prefix}.")):
        if candidate in stored:
            return stored[candidate]
    return None
