"""Attention of a packed sequence whose parts share prefixes, for any model that takes its attention from transformers.

Such a sequence is a forest: a prefix, then its branches, then the next prefix. A branch looks at its prefix and at itself, never at
another branch, and its positions go on from the prefix. The model itself is not changed: one attention function is registered with
transformers, which cuts the sequence into its parts and gives each to PyTorch's fused attention kernel, so no mask of the size of
the whole sequence exists.
"""

from typing import Any, NamedTuple

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

ATTENTION = "tagpr_tree"
"""Name of the attention function among those of transformers."""


class Segment(NamedTuple):
    """Tokens ``start`` to ``end`` of a packed sequence: causal among themselves, after all of the prefix.

    Segments follow each other without a gap; a prefix is the beginning of an earlier one, or empty.
    """

    start: int
    end: int
    prefix_start: int
    prefix_end: int


def use_tree_attention(model: PreTrainedModel) -> None:
    """Make a model take ``segments`` (a tuple of :class:`Segment`) beside one packed sequence.

    Raises:
        ValueError: the model's layers look at a window of tokens only, or its attention cannot be replaced.
    """
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(f"the model has {', '.join(sorted(kinds))} layers")
    AttentionInterface.register(ATTENTION, tree_attention)
    try:
        model.set_attn_implementation(ATTENTION)
    except (ValueError, ImportError) as error:
        raise ValueError("the model's attention cannot be replaced") from error


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: tuple[Segment, ...] = (),
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a packed sequence, one call of the fused kernel for each segment.

    Args:
        module: the attention layer that asks.
        query: [1, heads, tokens, head size]; ``key`` and ``value`` with the layer's key-value heads.
        key: see ``query``.
        value: see ``query``.
        attention_mask: unused; transformers makes none for an attention function of ours.
        dropout: of attention weights.
        scaling: of the scores; None: one over the root of the head size.
        segments: what the sequence consists of.

    Returns:
        [1, tokens, heads, head size], and no weights.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # One split, whose backward is one concatenation; a slice's would be a sequence of zeros for every segment.
    lengths = [each.end - each.start for each in segments]
    pieces = list(zip(*(each.split(lengths, 2) for each in (query, key, value)), strict=True))
    at = {each.start: place for place, each in enumerate(segments)}
    parts = []
    for (own_query, own_key, own_value), (_start, _end, prefix_start, prefix_end) in zip(
        pieces, segments, strict=True
    ):
        mask, causal = None, True
        if prefix_end > prefix_start:
            _, *prefix = pieces[at[prefix_start]]
            length = prefix_end - prefix_start
            own_key, own_value = (
                torch.cat([shared[:, :, :length], own], 2)
                for shared, own in zip(prefix, (own_key, own_value), strict=True)
            )
            mask, causal = causal_lower_right(own_query.shape[2], own_key.shape[2]), False
        parts.append(
            scaled_dot_product_attention(
                own_query, own_key, own_value, mask, dropout, is_causal=causal, scale=scaling
            )
        )
    return torch.cat(parts, 2).transpose(1, 2), None
