"""A chain cut into numbered pieces, which a tagger's reply points to instead of writing the chain again (S9, S12).

A segment's boundaries are numbers of pieces, and its text is a slice of the chain itself: whatever the reply says, not a
letter of the chain can change. The cuts need not be good, only fine enough; a segment takes as many pieces as it likes.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Place = tuple[int, int]
"""Start and end of a piece or segment in the chain; neither begins nor ends in white space."""

# A sentence ends in these, with the quotes and brackets that close after them; full-width ones need no space. The look-behind
# keeps a run of full stops from being tried at each of them.
_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]]*+(?=\s)|[。！？]++[”’）」』]*+")
# "1." at the start of a line and "e.g." anywhere end no sentence. Where in doubt, cut: "option B." does end one.
_NO_END = re.compile(r"\A\s*[0-9]{1,3}\.\Z|(?:\A|[\s(])(?:e\.g|i\.e|vs|cf|Dr|Mr|Mrs|Ms|Fig)\.\Z")
_CLAUSE_END = re.compile(r"[,;:](?=\s)|[，；：、]|\s[-–—](?=\s)")
_LONGEST_NO_END = 8


def cut(chain: str, at_least: int = 1) -> list[Place]:
    """Places of the chain's sentences and lines; of its clauses, where there are fewer than ``at_least`` sentences."""
    pieces = list(_parts(chain, _END))
    return pieces if len(pieces) >= at_least else list(_parts(chain, _END, _CLAUSE_END))


def _parts(chain: str, *ends: re.Pattern[str]) -> Iterator[Place]:
    start = 0
    for line in chain.splitlines(keepends=True):
        cuts = {start, start + len(line)}
        for pattern in ends:
            for match in pattern.finditer(line):
                low = match.end() - _LONGEST_NO_END
                before = line[: match.end()] if low <= 0 else f"…{line[low : match.end()]}"
                if not _NO_END.search(before):
                    cuts.add(start + match.end())
        for low, high in pairwise(sorted(cuts)):
            text = chain[low:high]
            if text.strip():
                left, right = len(text) - len(text.lstrip()), len(text.rstrip())
                yield low + left, low + right
        start += len(line)


def numbered(chain: str, pieces: Sequence[Place]) -> str:
    """The chain as a prompt shows it: ``1| first piece``, one a line. No piece holds a line break, so none can fake a line."""
    return "\n".join(
        f"{number}| {' '.join(chain[start:end].split())}"
        for number, (start, end) in enumerate(pieces, start=1)
    )


class Span(BaseModel):
    """A segment of a reply: its first and its last piece."""

    model_config = ConfigDict(extra="forbid")
    first: Annotated[int, Field(strict=True, description="number of the segment's first line")]
    last: Annotated[int, Field(strict=True, description="number of the segment's last line")]


def place_spans(spans: Sequence[Span], pieces: Sequence[Place]) -> tuple[list[Place], str]:
    """Places of the spans in the chain, or the first problem: together they must be all pieces, in order, each once.

    ``span_out_of_range``: a number that no piece has. ``span_reversed``: the last piece comes before the first.
    ``span_gap`` and ``span_overlap``: a span does not begin after the one before it. ``span_incomplete``: pieces are left.
    """
    places: list[Place] = []
    done = 0
    for span in spans:
        if not (1 <= span.first <= len(pieces) and 1 <= span.last <= len(pieces)):
            return [], "span_out_of_range"
        if span.last < span.first:
            return [], "span_reversed"
        if span.first != done + 1:
            return [], "span_gap" if span.first > done + 1 else "span_overlap"
        places.append((pieces[span.first - 1][0], pieces[span.last - 1][1]))
        done = span.last
    return (places, "") if done == len(pieces) else ([], "span_incomplete")
