"""Attention of a packed sequence whose parts share prefixes, for any model that takes its attention from transformers.

Such a sequence is a forest: a prefix, then its branches, then the next prefix. A branch looks at its prefix and at itself, never at
another branch, and its positions go on from the prefix. The model itself is not changed: one attention function is registered with
transformers, which cuts the sequence into its parts and gives each to PyTorch's fused attention kernel, so no mask of the size of
the whole sequence exists.

On a CPU, all branches of a prefix look at it in one call, each looks at itself in another, and the two are put together by the sums
that the softmax divides by (:class:`_TwoPartAttention`): no copy of the prefix for each branch, and no mask at all.
"""

from collections.abc import Iterator
from itertools import groupby
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
    """Attention of a packed sequence, with the fused kernel for each segment.

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
    # The kernel takes what is asked of it at its word: the checks are ours.
    plain = value.shape[-1] == query.shape[-1] and all(each.stride(-1) == 1 for each in (query, key, value))
    if query.device.type == "cpu" and not dropout and plain:
        # Under autocast, norms leave queries and keys in float32 where values are not.
        query, key = query.to(value.dtype), key.to(value.dtype)
        return _TwoPartAttention.apply(query, key, value, segments, scaling).transpose(1, 2), None
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


class _TwoPartAttention(torch.autograd.Function):
    """Attention to the prefix and attention to oneself, computed apart.

    With ``l`` the log-sum-exp of a part's scores and ``o`` what it attends to, the whole is ``l = log(exp(l1) + exp(l2))`` and
    ``o = exp(l1 - l) o1 + exp(l2 - l) o2``. The gradient needs no such sum: given ``l`` and ``o`` of the whole, the kernel's
    backward of a part yields that part's share (Dao et al., FlashAttention, algorithm 4).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: tuple[Segment, ...],
        scale: float | None,
    ) -> torch.Tensor:
        """``query``, ``key`` and ``value``: [1, heads, tokens, head size]; returns as much."""
        _, heads, tokens, size = query.shape
        out = query.new_empty(1, tokens, heads, size).transpose(1, 2)
        sums = None
        for start, end, *_ in segments:
            part, own_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *(each[:, :, start:end] for each in (query, key, value)), 0.0, True, scale=scale
            )
            if sums is None:
                sums = own_sums.new_empty(1, tokens, heads).transpose(1, 2)
            out[:, :, start:end], sums[:, :, start:end] = part, own_sums
        assert sums is not None, "a sequence without a segment"
        for start, end, prefix_start, prefix_end in _branches(segments):
            part, part_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, start:end],
                *(each[:, :, prefix_start:prefix_end] for each in (key, value)),
                scale=scale,
            )
            own, own_sums = out[:, :, start:end], sums[:, :, start:end]
            both = torch.logaddexp(own_sums, part_sums)
            own.mul_((own_sums - both).exp()[..., None]).add_(part * (part_sums - both).exp()[..., None])
            own_sums.copy_(both)
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of the output, [1, heads, tokens, head size]."""
        query, key, value, out, sums = ctx.saved_tensors
        grads = [torch.empty_like(each) for each in (query, key, value)]

        def of_part(start: int, end: int, keys_start: int, keys_end: int, causal: bool) -> Any:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad[:, :, start:end], query[:, :, start:end], key[:, :, keys_start:keys_end], value[:, :, keys_start:keys_end],
                out[:, :, start:end], sums[:, :, start:end], 0.0, causal, scale=ctx.scale,
            )  # fmt: skip

        for start, end, *_ in ctx.segments:
            for made, part in zip(grads, of_part(start, end, start, end, True), strict=True):
                made[:, :, start:end] = part
        for start, end, prefix_start, prefix_end in _branches(ctx.segments):
            parts = of_part(start, end, prefix_start, prefix_end, False)
            grads[0][:, :, start:end] += parts[0]
            for made, part in zip(grads[1:], parts[1:], strict=True):
                made[:, :, prefix_start:prefix_end] += part
        return (*grads, None, None)


def _branches(segments: tuple[Segment, ...]) -> Iterator[Segment]:
    """Neighbours with the same prefix as one segment; those without a prefix left out."""
    for (prefix_start, prefix_end), members in groupby(segments, lambda each: each[2:]):
        if prefix_end > prefix_start:
            first, *others = members
            yield Segment(first.start, others[-1].end if others else first.end, prefix_start, prefix_end)
