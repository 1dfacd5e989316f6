"""User rows while they are trained: apart from the vocabulary's embedding table, updated only where a batch needs them.

A table of a million users would otherwise cost a dense gradient, two dense moments of Adam and, with several processes, a
dense reduction at each step. Here a step costs what its batch's users cost.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from tagpr.prmu.encoding import UserRows
from tagpr.prmu.packing import EncodedPair

# Length of the random part of a row that starts from preferences, relative to the other part.
NOISE = 0.3


class RowTable:
    """Rows of the users (row 0: the unknown one), float32 [1 + users, hidden size], with an Adam of their own.

    Each row has its own count of updates, so that a row that comes rarely gets Adam's full steps and is left alone otherwise
    (dense Adam moves rows on momentum when they are absent, and its bias correction is that of the whole run). No weight decay.
    """

    def __init__(
        self, rows: torch.Tensor, first: int, betas: tuple[float, float] = (0.9, 0.98), epsilon: float = 1e-8
    ) -> None:
        self.rows = rows.detach().float()
        self.first = first
        self.betas = betas
        self.epsilon = epsilon
        self.moments = torch.zeros(2, *rows.shape, device=rows.device)
        self.updates = torch.zeros(len(rows), dtype=torch.int32, device=rows.device)

    def index(self, ids: torch.Tensor) -> torch.Tensor:
        """Places in ``rows`` of vocabulary ids."""
        return ids - self.first

    def step(self, index: torch.Tensor, gradient: torch.Tensor, rate: float) -> None:
        """Update rows ``index`` [k], each there once, by their gradient [k, hidden size]."""
        if not len(index):
            return
        self.updates[index] += 1
        count = self.updates[index].float()[:, None]
        mean, square = self.moments[0][index], self.moments[1][index]
        first, second = self.betas
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        self.moments[0][index], self.moments[1][index] = mean, square
        size = (square / (1 - second**count)).sqrt_() + self.epsilon
        self.rows[index] -= rate * (mean / (1 - first**count)) / size

    def state(self) -> dict[str, torch.Tensor]:
        """What :meth:`restore` needs."""
        return {"rows": self.rows, "moments": self.moments, "updates": self.updates}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a :meth:`state`."""
        for name, value in self.state().items():
            value.copy_(state[name])


def preferred(
    words: torch.Tensor, pairs: Sequence[EncodedPair], first: int, count: int, *, centred: bool = True
) -> torch.Tensor:
    """Where the rows of users point before training: towards what their chosen responses say and the rejected ones do not.

    Of each pair, the sum of the word embeddings of the chosen response minus that of the rejected one, past what both begin
    with, at length 1; summed over a user's pairs; minus the mean over the users that have pairs, since what all prefer is the
    model's own business. A row is then made of directions that the base model reads already: it learns to compare words with
    the row, one rule for all users, where it would have to learn each random row by heart (which a model of two layers does not
    within a thousand pairs).

    Args:
        words: embedding table of the vocabulary, [at least ``first``, hidden size].
        pairs: to train on.
        first: vocabulary id of the unknown row.
        count: rows, the unknown one included.
        centred: subtract the mean over users; without it a row depends on its own user's pairs alone.

    Returns:
        float32 [count, hidden size], rows of length 1; of users without pairs, and the unknown row, 0.
    """
    found = torch.zeros(count, words.shape[1])
    with torch.no_grad():
        for pair in pairs:
            shared = pair.shared
            # A user row at the end is no word.
            chosen, rejected = (
                words[[token for token in ids[shared:] if token < first]].float().sum(0)
                for ids in (pair.chosen, pair.rejected)
            )
            difference = chosen - rejected
            found[pair.chosen[0] - first] += torch.nn.functional.normalize(difference.cpu(), dim=0)
        found[0] = 0
        known = found.norm(dim=1) > 0
        if centred and int(known.sum()) > 1:
            found[known] -= found[known].mean(0)
        return torch.nn.functional.normalize(found, dim=1)


def take_out(model: PreTrainedModel, users: UserRows, betas: Sequence[float] = (0.9, 0.98)) -> RowTable:
    """Take the user rows out of a model's embedding table, which then ends before them."""
    table = model.get_input_embeddings()
    weight = table.weight.detach()
    rows = RowTable(
        weight[users.unknown_row : users.end].clone(), users.unknown_row, (float(betas[0]), float(betas[1]))
    )
    _replace(model, weight[: users.unknown_row].clone())
    return rows


def put_back(model: PreTrainedModel, users: UserRows, rows: torch.Tensor) -> None:
    """Undo :func:`take_out`, with these rows: the embedding table holds the vocabulary and then the users."""
    weight = model.get_input_embeddings().weight.detach()
    size = max(model.config.vocab_size, users.end)
    whole = weight.new_zeros(size, weight.shape[1])
    whole[: users.unknown_row] = weight
    whole[users.unknown_row : users.end] = rows.to(weight.dtype)
    _replace(model, whole)
    model.config.vocab_size = size


def _replace(model: PreTrainedModel, weight: torch.Tensor) -> None:
    old = model.get_input_embeddings()
    padding = old.padding_idx if old.padding_idx is not None and old.padding_idx < len(weight) else None
    fresh = nn.Embedding(len(weight), weight.shape[1], padding, _weight=weight)
    model.set_input_embeddings(fresh)
