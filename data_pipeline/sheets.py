"""One sample of chains on three kinds of sheets: a page to click through, Markdown to read, CSV to fill in (S13).

Everything shown was written by users or models: it is escaped, and characters that would not be seen are made visible.
"""

import csv
import hashlib
import html
import io
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.finished import Finished
from data_pipeline.verdicts import COLUMNS, guarded
from tagpr.benchmarks.tasks import get_task
from tagpr.page.document import document, filled, read_part
from tagpr.page.parts import tag_hues
from tagpr.schema import Example, ProfileItem
from tagpr.tags import neutralise, parse_segments, split_response, vocabulary

SIMULATED = "SIMULATED: teacher, judge and tagger are no models, and their text says nothing about any."
# Needed inside emoji and by several scripts; every other format character is shown by its number.
_JOINERS = "\u200c\u200d"


@dataclass(frozen=True)
class Card:
    """A chain of the sample and, where the prepared data are at hand, the example that it answers."""

    chain: Finished
    example: Example | None

    @property
    def text_hash(self) -> str:
        """Hash of everything a reviewer judges: another text is another chain to them."""
        shown = [self.chain.id, self.chain.prompt, self.chain.response, self.chain.gold]
        return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:32]

    @property
    def query(self) -> str:
        """The raw question, else the whole prompt."""
        return self.chain.prompt if self.example is None else self.example.query

    @property
    def items(self) -> list[ProfileItem]:
        """The profile items that the prompt shows, with those of their fields that it shows, in file order."""
        items = () if self.example is None else self.example.profile
        return [shown for item in items if (shown := _shown(item, self.chain.prompt))]


# A field is known again by its beginning (its end may have been cut), an item by a field that is no mere score or label.
_BEGINNING = 40
_TELLING = 8


def _shown(item: ProfileItem, prompt: str) -> ProfileItem | None:
    fields = {
        name: text for name, text in item.fields.items() if text and neutralise(text)[:_BEGINNING] in prompt
    }
    if fields == item.fields or any(len(text) >= _TELLING for text in fields.values()):
        return item.model_copy(update={"fields": fields})
    return None


def sample_hash(cards: Sequence[Card]) -> str:
    """Names a sample: the same chains with the same texts."""
    return hashlib.sha256("".join(card.text_hash for card in cards).encode()).hexdigest()[:16]


def html_sheet(cards: Sequence[Card], title: str, simulated: bool) -> str:
    """One page that needs nothing else: no network, and no script but its own (content security policy)."""
    legend = "".join(
        f'<span><span class="pill t{number}">{tag}</span> {html.escape(definition)}</span>'
        for number, (tag, definition) in enumerate(vocabulary().items())
    )
    body = filled(
        __package__,
        "review.html",
        title=html.escape(title),
        banner=f'<p class="banner">{SIMULATED}</p>' if simulated else "",
        legend=legend,
        cards="\n".join(_card(number, card) for number, card in enumerate(cards, start=1)),
    )
    return document(
        title,
        body,
        style=read_part(__package__, "review.css") + tag_hues(len(vocabulary())),
        script=read_part(__package__, "review.js"),
        data={"sample": sample_hash(cards), "chains": len(cards)},
    )


def _card(number: int, card: Card) -> str:
    chain = card.chain
    response = split_response(chain.response)
    # The judge's scores are left out: whoever sees them agrees with them.
    facts = f"user {chain.user_id}, {chain.id}"
    profile = "".join(f"<li>{_item(item)}</li>" for item in card.items)
    question = f'<h3>Question</h3><div class="text">{_text(card.query)}</div>'
    if profile:
        question += f"<h3>Profile, {len(card.items)} items</h3><ol class='profile'>{profile}</ol>"
    if card.example is not None:
        question += f"<details><summary>The prompt as the teacher saw it</summary><pre>{_text(chain.prompt)}</pre></details>"
    answers = "".join(
        f'<div><h3>{name}</h3><div class="text">{_text(text)}</div></div>'
        for name, text in (("Answer", response.answer), ("Gold: the user's own", chain.gold))
    )
    buttons = "".join(
        f'<button type="button" class="{name}"><kbd>{key}</kbd> {name}</button>'
        for key, name in enumerate(("right", "wrong", "unsure"), start=1)
    )
    return (
        f'<article data-id="{_attribute(chain.id)}" data-hash="{card.text_hash}">'
        f"<h2>{number}. {html.escape(get_task(chain.task).title)} <small>{_text(facts)}</small></h2>"
        f'<div class="columns"><div>{question}</div>'
        f'<div><h3>Chain</h3>{_segments(response.reasoning)}<div class="pair">{answers}</div></div></div>'
        f'<div class="verdict">{buttons}<input placeholder="note" aria-label="note on chain {number}" maxlength="10000"></div>'
        "</article>"
    )


def _item(item: ProfileItem) -> str:
    fields = "; ".join(f"<b>{html.escape(name)}</b> {_text(text)}" for name, text in item.fields.items())
    return f'<span class="text">{fields}</span>'


def _segments(reasoning: str) -> str:
    parsed = parse_segments(reasoning)
    if parsed.problem:
        return f'<div class="text">{_text(reasoning)}</div>'
    tags = list(vocabulary())
    return "".join(
        f'<div class="segment t{tags.index(tag)}"><span class="pill t{tags.index(tag)}">{tag}</span> '
        f'<span class="text">{_text(text)}</span></div>'
        for tag, text in parsed.segments
    )


def _attribute(text: str) -> str:
    return html.escape(text).replace("\n", "&#10;").replace("\r", "&#13;").replace("\t", "&#9;")


def _text(text: str) -> str:
    return "".join(
        f'<span class="hidden-character" title="{unicodedata.name(character, "control")}">U+{ord(character):04X}</span>'
        if _is_hidden(character)
        else html.escape(character)
        for character in text
    )


def _is_hidden(character: str) -> bool:
    """Whether a browser would show nothing, or reorder its neighbours: such text can read otherwise than it is."""
    return (
        character not in "\n\t "
        and character not in _JOINERS
        and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
    )


def _plain(text: str) -> str:
    """For sheets without markup: what would not be seen as ``[U+200B]``."""
    return "".join(f"[U+{ord(character):04X}]" if _is_hidden(character) else character for character in text)


def markdown_sheet(cards: Sequence[Card], title: str, simulated: bool) -> str:
    """For reading and for discussions; verdicts go into the CSV. Untrusted text stands in code blocks."""
    parts = [
        f"# {title}",
        f"**{SIMULATED}**" if simulated else "",
        "Write verdicts (right, wrong, unsure) into `sheet.csv`.",
    ]
    for number, card in enumerate(cards, start=1):
        chain, response = card.chain, split_response(card.chain.response)
        parts.append(f"## {number}. {get_task(chain.task).title}")
        profile = "\n".join(
            "; ".join(f"{name}: {text}" for name, text in item.fields.items()) for item in card.items
        )
        for name, text in (
            ("Chain, user and hash", f"{chain.id}\n{chain.user_id}\n{card.text_hash}"), ("Question", card.query),
            ("Profile", profile), ("Chain", response.reasoning), ("Answer", response.answer), ("Gold", chain.gold),
        ):  # fmt: skip
            if text:
                parts += [f"{name}:", _block(_plain(text))]
    return "\n\n".join(filter(None, parts)) + "\n"


def _block(text: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def csv_sheet(cards: Sequence[Card]) -> str:
    """For a spreadsheet: fill in ``verdict``, and ``note`` and ``reviewer`` as you like, and give the file back."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow([*COLUMNS, "task", "user", "question", "profile", "chain", "answer", "gold"])
    for card in cards:
        chain, response = card.chain, split_response(card.chain.response)
        profile = "\n".join(
            "; ".join(f"{name}: {text}" for name, text in item.fields.items()) for item in card.items
        )
        shown = (card.query, profile, response.reasoning, response.answer, chain.gold)
        writer.writerow(
            [guarded(chain.id), card.text_hash, "", "", "", chain.task, guarded(chain.user_id)]
            + [guarded(_plain(text)) for text in shown]
        )
    # Without the mark some spreadsheets take UTF-8 for something older.
    return "\ufeff" + stream.getvalue()
