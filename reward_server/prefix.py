"""Scoring with transformers where responses to one prompt share its computation (S21).

The inputs of one call are laid out behind each other without padding. The tokens up to the response, which depend on user and
prompt alone, are computed once for a group; its responses look at their keys and values and at themselves. The keys and values
stay in a bounded cache, so responses to the same prompt that come in a later call find them there.

Attention of a response is the sum of two parts that the fused kernel computes, over the prefix (all responses of the group in one
call, no mask) and over itself (causal), joined by their log-sum-exp; so nothing is copied for each response, and nothing is
computed on padding.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from reward_server.engine import EngineCounts, TransformersEngine
from tagpr.prmu.encoding import Encoded
from tagpr.prmu.model import Prmu

logger = logging.getLogger(__name__)

ATTENTION = "tagpr_prefix"
"""Name of the attention function among those of transformers."""


@dataclass(eq=False)
class Prefix:
    """Keys and values of the tokens before a response, by layer: [1, key-value heads, tokens, head size]."""

    token_ids: tuple[int, ...]
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for pair in self.layers.values() for part in pair)


@dataclass(frozen=True)
class Part:
    """Tokens that one forward pass computes: a prefix itself (``place`` is None) or the response of input ``place``."""

    prefix: Prefix
    token_ids: Sequence[int]
    place: int | None


@dataclass(frozen=True)
class Span:
    """Where the parts of one prefix lie in a packed sequence: ``prefix`` is (start, end) where it is among them."""

    prefix: Prefix
    computed: tuple[int, int] | None
    responses: tuple[tuple[int, int], ...]


class PrefixEngine(TransformersEngine):
    """Shares prefixes within a call and, by a least-recently-used cache, between calls.

    Args:
        prmu: loaded checkpoint.
        batch_tokens: computed in one forward pass, at most; a longer input is a pass of its own.
        cache_bytes: of keys and values kept for later calls.
    """

    def __init__(self, prmu: Prmu, batch_tokens: int, cache_bytes: int) -> None:
        super().__init__(prmu, batch_tokens)
        self._cache_bytes = cache_bytes
        self._kept: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()
        self._kept_bytes = 0
        AttentionInterface.register(ATTENTION, prefix_attention)
        prmu.model.set_attn_implementation(ATTENTION)

    def score(self, inputs: Sequence[Encoded]) -> list[float]:
        """Logit of each input, in order."""
        logits = [0.0] * len(inputs)
        with torch.inference_mode():
            for parts in self._passes(inputs):
                for place, logit in self._forward(parts):
                    logits[place] = logit
        return logits

    def close(self) -> None:
        """Drop what is cached."""
        self._kept.clear()
        self._kept_bytes = 0

    def _passes(self, inputs: Sequence[Encoded]) -> Iterator[list[Part]]:
        """Every input's response, each after its prefix: in the same pass, an earlier one, or from the cache."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, one in enumerate(inputs):
            groups.setdefault(tuple(one.token_ids[: one.prefix_tokens]), []).append(place)
        parts: list[Part] = []
        total = 0
        for token_ids, places in groups.items():
            prefix = self._kept.get(token_ids)
            fresh = prefix is None
            if prefix is None:
                prefix = Prefix(token_ids)
                group = [Part(prefix, token_ids, None)]
            else:
                self._kept.move_to_end(token_ids)
                group = []
            group += [Part(prefix, inputs[at].token_ids[inputs[at].prefix_tokens :], at) for at in places]
            for part in group:
                if parts and total + len(part.token_ids) > self._batch_tokens:
                    yield parts
                    parts, total = [], 0
                parts.append(part)
                total += len(part.token_ids)
            shared = len(token_ids) * (len(places) - fresh)
            self._counts = EngineCounts(
                self._counts.tokens + sum(len(inputs[at].token_ids) for at in places),
                self._counts.cached_tokens + shared,
            )
        if parts:
            yield parts

    def _forward(self, parts: Sequence[Part]) -> list[tuple[int, float]]:
        ids: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        ends: list[tuple[int, int]] = []
        for part in parts:
            start, length = len(ids), len(part.token_ids)
            ids += part.token_ids
            first = 0 if part.place is None else len(part.prefix.token_ids)
            positions += range(first, first + length)
            if not spans or spans[-1].prefix is not part.prefix:
                spans.append(Span(part.prefix, None, ()))
            if part.place is None:
                spans[-1] = Span(part.prefix, (start, start + length), ())
            else:
                last = spans[-1]
                spans[-1] = Span(last.prefix, last.computed, (*last.responses, (start, start + length)))
                ends.append((part.place, start + length - 1))
        model = self._prmu.model
        hidden = model.base_model(
            input_ids=torch.tensor([ids], device=model.device),
            position_ids=torch.tensor([positions], device=model.device),
            use_cache=False,
            spans=tuple(spans),
        ).last_hidden_state
        for span in spans:
            if span.computed is not None:
                self._keep(span.prefix)
        if not ends:
            return []
        values = model.score(hidden[0, [end for _, end in ends]])[:, 0].float().tolist()
        return [(place, value) for (place, _), value in zip(ends, values, strict=True)]

    def _keep(self, prefix: Prefix) -> None:
        size = prefix.size
        if size > self._cache_bytes:
            return
        self._kept[prefix.token_ids] = prefix
        self._kept_bytes += size
        while self._kept_bytes > self._cache_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.size


def shares_prefixes(prmu: Prmu) -> bool:
    """Whether a model's attention can be replaced and looks at all tokens; else inputs have to be scored whole."""
    kinds = set(getattr(prmu.model.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(prmu.model.config, "use_sliding_window", False):
        return False
    return bool(getattr(prmu.model, "_supports_attention_backend", False)) and hasattr(prmu.model, "score")


def prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    spans: tuple[Span, ...] = (),
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a packed sequence; keeps the keys and values of the prefixes in it.

    Args:
        module: the attention layer that asks.
        query: [n, heads, tokens, head size]; ``key`` and ``value`` with the layer's key-value heads.
        key: see ``query``.
        value: see ``query``.
        attention_mask: unused; transformers makes none for an attention function of ours.
        scaling: of the scores; None: one over the root of the head size.
        spans: what the sequence (then n = 1) consists of; none: an ordinary batch, padded on the right.

    Returns:
        [n, tokens, heads, head size], and no weights.
    """
    if not spans:
        plain = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return plain.transpose(1, 2), None
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    output = torch.empty_like(query)
    for span in spans:
        if span.computed is not None:
            start, end = span.computed
            own = (key[:, :, start:end], value[:, :, start:end])
            # A copy: a view would keep the whole pass's keys and values alive in the cache.
            span.prefix.layers[layer] = (own[0].clone(), own[1].clone())
            output[:, :, start:end] = _causal(query[:, :, start:end], *own, scaling)[0]
        if span.responses:
            _responses(query, key, value, output, span, layer, scaling)
    return output.transpose(1, 2), None


def _responses(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    span: Span,
    layer: int,
    scaling: float | None,
) -> None:
    before_key, before_value = span.prefix.layers[layer]
    if query.device.type != "cpu":
        for start, end in span.responses:
            own_key = torch.cat([before_key, key[:, :, start:end]], 2)
            own_value = torch.cat([before_value, value[:, :, start:end]], 2)
            output[:, :, start:end] = scaled_dot_product_attention(
                query[:, :, start:end],
                _repeated(own_key, query),
                _repeated(own_value, query),
                causal_lower_right(end - start, own_key.shape[2]),
                scale=scaling,
            )
        return
    first, last = span.responses[0][0], span.responses[-1][1]
    group = query[:, :, first:last]
    # Without a mask, query heads that share a key-value head are just more queries of it.
    folded = group.reshape(1, before_key.shape[1], -1, group.shape[3])
    before, before_lse = _kernel(folded, before_key, before_value, causal=False, scaling=scaling)
    before, before_lse = before.reshape(group.shape), before_lse.reshape(group.shape[:3])
    for start, end in span.responses:
        own, own_lse = _causal(query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], scaling)
        place = slice(start - first, end - first)
        share = torch.sigmoid(own_lse - before_lse[:, :, place])[..., None]
        output[:, :, start:end] = torch.lerp(before[:, :, place].float(), own.float(), share)


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = _repeated(key, query), _repeated(value, query)
    if query.device.type != "cpu":
        whole = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return whole, whole.new_empty(0)
    return _kernel(query, key, value, causal=True, scaling=scaling)


def _kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool, scaling: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's fused CPU kernel; unlike its public face it also gives the log-sum-exp of the scores, float32."""
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, scale=scaling
    )
    return output, lse


def _repeated(states: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    times = query.shape[1] // states.shape[1]
    return states.repeat_interleave(times, 1) if times > 1 else states
