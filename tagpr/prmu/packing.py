"""How the two inputs of a preference pair go through the model: three layouts, the same logits and gradients (S18).

Both inputs begin with the same user row and prompt, and often with the same first words of the response; other pairs of the batch
may be about the same prompt, and have a response in common with this one.

``shared_prefix``  one sequence ``[prefix, rest of one input, rest of another, ...]`` for the pairs of a prompt, each input once,
                   the prompts of a batch behind each other. A rest looks at the prefix and at itself, never at another rest, and
                   its (rotary) positions go on from the prefix: a tree with a branch for each input.
``padding_free``   both inputs in full, all behind each other, each looking at itself only. What shared_prefix is checked against.
``padded``         one input a row, padded on the right to the longest.

The first two go through :mod:`tagpr.tree_attention`, which needs no change of any model and no mask of the size of the sequence.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedModel

from tagpr.errors import ConfigError
from tagpr.tree_attention import Segment, use_tree_attention

Packing = Literal["shared_prefix", "padding_free", "padded"]
PACKINGS: tuple[Packing, ...] = ("shared_prefix", "padding_free", "padded")


class EncodedPair(NamedTuple):
    """Token ids of both inputs of a pair; they share the user row and the prompt, ``prompt_tokens`` tokens.

    Pairs with the same such tokens share them in a batch; 0 where this is not known, and the pair shares with no other.
    """

    chosen: list[int]
    rejected: list[int]
    prompt_tokens: int = 0

    @property
    def length(self) -> int:
        """Tokens of the longer input."""
        return max(len(self.chosen), len(self.rejected))

    def with_row(self, row: int) -> "EncodedPair":
        """The same pair as another user's: the first token, and where it comes again."""
        own = self.chosen[0]
        return EncodedPair(
            [row if token == own else token for token in self.chosen],
            [row if token == own else token for token in self.rejected],
            self.prompt_tokens,
        )

    @property
    def prompt(self) -> tuple[int, ...]:
        """What pairs about the same prompt have in common: user row and prompt."""
        return tuple(self.chosen[: self.prompt_tokens])

    @property
    def shared(self) -> int:
        """Tokens that both inputs begin with; at least one of each is left over, whose logit is read."""
        return _shared((self.chosen, self.rejected))


class Batch(NamedTuple):
    """Pairs as the model takes them: ``token_ids`` and ``positions`` [rows, tokens].

    ``user_places`` [k, 2] (row and column) are the user rows, of ids ``users`` [k]; in ``token_ids`` the padding token stands
    there. ``ends`` [2 n, 2] are the last tokens of the chosen inputs and then of the rejected ones. ``segments`` is empty for
    a padded batch.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    users: torch.Tensor
    user_places: torch.Tensor
    ends: torch.Tensor
    segments: tuple[Segment, ...]

    def to(self, device: torch.device | str) -> "Batch":
        """The same on another device."""
        moved = {name: value.to(device) for name, value in self._asdict().items() if name != "segments"}
        return self._replace(**moved)


def pack(pairs: Sequence[EncodedPair], packing: Packing, pad_token_id: int) -> Batch:
    """Lay pairs out for one forward pass."""
    if packing == "padded":
        return _padded(pairs, pad_token_id)
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    places: list[tuple[int, int]] = []
    users: list[int] = []

    def add(tokens: Sequence[int], user: int, position: int, prefix: tuple[int, int]) -> int:
        start = len(ids)
        for token in tokens:
            if token == user:
                places.append((0, len(ids)))
                users.append(user)
                token = pad_token_id
            ids.append(token)
        positions.extend(range(position, position + len(tokens)))
        segments.append(Segment(start, len(ids), *prefix))
        return len(ids) - 1

    chosen_ends, rejected_ends = [0] * len(pairs), [0] * len(pairs)
    for members in prompt_groups(pairs) if packing == "shared_prefix" else [[at] for at in range(len(pairs))]:
        inputs = [side for at in members for side in (pairs[at].chosen, pairs[at].rejected)]
        user, first, shared = inputs[0][0], len(ids), 0
        ends: dict[tuple[int, ...], int] = {}
        if packing == "shared_prefix":
            shared = _shared(inputs)
        for each in inputs:
            if (key := tuple(each)) in ends and packing == "shared_prefix":
                continue
            done = shared if ends else 0
            ends[key] = add(each[done:], user, done, (first, first + done))
        for at in members:
            chosen_ends[at], rejected_ends[at] = (
                ends[tuple(pairs[at].chosen)],
                ends[tuple(pairs[at].rejected)],
            )
    return Batch(
        torch.tensor([ids]),
        torch.tensor([positions]),
        torch.tensor(users),
        torch.tensor(places),
        torch.tensor([(0, end) for end in chosen_ends + rejected_ends]),
        tuple(segments),
    )


def prompt_groups(pairs: Sequence[EncodedPair]) -> list[list[int]]:
    """Places of the pairs of each prompt, prompts in the order of their first pair."""
    groups: dict[tuple[int, ...] | int, list[int]] = {}
    for at, pair in enumerate(pairs):
        groups.setdefault(pair.prompt if pair.prompt_tokens else at, []).append(at)
    return list(groups.values())


def _shared(inputs: Sequence[list[int]]) -> int:
    """Tokens that all inputs begin with, at least one of each left over, whose logit is read."""
    most = min(map(len, inputs)) - 1
    # All others lie between these two.
    first, last = min(inputs), max(inputs)
    return next((place for place in range(most) if first[place] != last[place]), most)


def _padded(pairs: Sequence[EncodedPair], pad_token_id: int) -> Batch:
    """As one right-padded batch.

    No attention mask is needed: the model is causal and the logit is read at the last token that is not padding, so padding is
    never looked at (and the masked attention kernel, slower on CPUs, is not taken).
    """
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    longest = max(map(len, sequences))
    places = [
        (row, column)
        for row, each in enumerate(sequences)
        for column, token in enumerate(each)
        if token == each[0]
    ]
    users = [sequences[row][0] for row, _ in places]
    rows = [[*each, *[pad_token_id] * (longest - len(each))] for each in sequences]
    for row, column in places:
        rows[row][column] = pad_token_id
    return Batch(
        torch.tensor(rows),
        torch.arange(longest)[None].expand(len(rows), -1),
        torch.tensor(users),
        torch.tensor(places),
        torch.tensor([(row, len(each) - 1) for row, each in enumerate(sequences)]),
        (),
    )


def logits(model: PreTrainedModel, batch: Batch, user_rows: torch.Tensor) -> torch.Tensor:
    """Logits, float32 [2 n]: of the chosen inputs, then of the rejected ones.

    Args:
        model: sequence classifier of one label; :func:`use_packing` has been called on it.
        batch: on the model's device.
        user_rows: [k, hidden size], the embedding of each of ``batch.users``.
    """
    embedded = model.get_input_embeddings()(batch.token_ids)
    rows, columns = batch.user_places.T
    embedded = embedded.index_put((rows, columns), user_rows.to(embedded.dtype))
    extra: dict[str, Any] = {"segments": batch.segments} if batch.segments else {}
    hidden = model.base_model(
        inputs_embeds=embedded, position_ids=batch.positions, use_cache=False, **extra
    ).last_hidden_state
    rows, columns = batch.ends.T
    values: torch.Tensor = model.score(hidden[rows, columns])
    return values[:, 0].float()


def use_packing(model: PreTrainedModel, packing: Packing) -> None:
    """Make a model take batches of this layout; ``padded`` gives it its usual attention back.

    Raises:
        ConfigError: the model's layers look at a window of tokens only, or its attention cannot be replaced.
    """
    if packing == "padded":
        model.set_attn_implementation("sdpa")
        return
    try:
        use_tree_attention(model)
    except ValueError as error:
        raise ConfigError(f"train_prmu.packing={packing}: {error}. Set padded.") from error
