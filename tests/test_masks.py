"""Descriptions of attention masks against the masks transformers builds."""

from __future__ import annotations

import pytest
import torch
from transformers import masking_utils

from surgeon import masks, ops
from surgeon.errors import UnsupportedError
from surgeon.masks import Mask, check, describe

LENGTH = 14
NO_PADDING = torch.zeros(2, dtype=torch.long)
FUNCTIONS = [
    (masking_utils.causal_mask_function, Mask(causal=True)),
    (masking_utils.bidirectional_mask_function, Mask()),
    (masking_utils.sliding_window_causal_mask_function(5), Mask(causal=True, window=5)),
    (masking_utils.sliding_window_bidirectional_mask_function(3), Mask(window=3)),
    (masking_utils.chunked_causal_mask_function(5, NO_PADDING), Mask(causal=True, chunk=5)),
]
each = pytest.mark.parametrize(("function", "mask"), FUNCTIONS, ids=[str(mask) for _, mask in FUNCTIONS])


@each
def test_the_description_is_read_off_the_function(function: masks.MaskFunction, mask: Mask) -> None:
    assert describe(function) == mask
    check(function, mask)


@each
@pytest.mark.parametrize("padding", [0, 1, 3, 6])
def test_every_cell_is_transformers(function: masks.MaskFunction, mask: Mask, padding: int) -> None:
    """Windows smaller than the input, chunks that begin after the padding."""
    keys = torch.ones(2, LENGTH, dtype=torch.bool)
    keys[0, :padding] = False
    if mask.chunk:
        function = masking_utils.chunked_causal_mask_function(mask.chunk, torch.tensor([padding, 0]))
    theirs = masking_utils.sdpa_mask(
        2, LENGTH, LENGTH, 0, 0, function, keys, allow_is_causal_skip=False, allow_is_bidirectional_skip=False
    )
    ours = ops.visible(
        keys, LENGTH, LENGTH, causal=mask.causal, window=mask.window, chunk=mask.chunk, device=torch.device("cpu")
    )
    assert theirs is not None
    assert ours is not None
    some = theirs.any(-1, keepdim=True)  # rows of padding see nothing here and anything there
    assert torch.equal(theirs & some, ours.expand_as(theirs) & some)


@pytest.mark.parametrize(
    "wrong",
    [
        Mask(causal=True, window=4),
        Mask(causal=True, window=6),
        Mask(window=5),
        Mask(causal=True),
        Mask(causal=True, chunk=5),
    ],
    ids=str,
)
def test_a_description_that_is_not_the_function_is_refused(wrong: Mask) -> None:
    with pytest.raises(UnsupportedError, match="not what its description"):
        check(masking_utils.sliding_window_causal_mask_function(5), wrong)


def test_what_cannot_be_described_is_not_guessed() -> None:
    def prefix(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key < 3) | (key <= query)

    causal = masking_utils.causal_mask_function
    assert describe(prefix) is None
    assert describe(masking_utils.sliding_window_causal_mask_function(0)) is None
    assert describe(masking_utils.and_masks(causal, prefix)) is None
    assert describe(masking_utils.or_masks(causal, prefix)) is None
    one, other = masking_utils.sliding_window_overlay(4), masking_utils.sliding_window_overlay(6)
    assert describe(masking_utils.and_masks(one, other)) is None
