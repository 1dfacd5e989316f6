"""A SIMULATED teacher, tagger and judge for MiniLaMP: they read a prompt's text, never hidden traits.

The chains follow a small grammar: four short sentences, each with its tag, then the answer. The teacher makes
mistakes at given rates, so that filters have something to filter and RL something to mend: it misreads the
pattern (lamp1-3), it ignores the profile (lamp4/5/7, a systematic fault that passes a ROUGE filter), it
rambles, and it guesses closing words.
"""

import random
import re
import zlib
from dataclasses import dataclass

from tagpr.benchmarks.minilamp.world import (
    ASPECTS,
    BIASES,
    FIELDS,
    GENRES,
    SENTIMENTS,
    STYLES,
    compose,
    cue_table,
    majority,
)
from tagpr.errors import DataError

FIELD_OF = cue_table(FIELDS)
GENRE_OF = cue_table(GENRES)
ASPECT_OF = cue_table(ASPECTS)
LEVEL_OF = {word: level for level, words in SENTIMENTS.items() for word in words}

GENERIC_OPENING = "The"
OFF_TOPIC = ("the sky is blue", "lunch was late", "my phone rang")


@dataclass(frozen=True)
class FaultRates:
    """Shares of chains, in [0, 1], in which the simulated teacher goes wrong."""

    lamp1: float = 0.20
    lamp2: float = 0.20
    lamp3: float = 0.35
    lazy: float = 0.55
    """lamp4/5/7: ignores the profile and opens with "The"."""
    sloppy: float = 0.10
    """Any task: repeats a step or adds an off-topic sentence; for the judge to catch."""
    closing: float = 0.25
    """lamp4/5/7: ends the answer on a closing word (a guess, unless the profile shows the user's)."""
    verify: float = 0.0
    """Any task, and no fault: checks the answer once more before it is given. Off, so that chains stay short."""


NO_FAULTS = FaultRates(lamp1=0.0, lamp2=0.0, lamp3=0.0, lazy=0.0, sloppy=0.0, closing=0.0)


@dataclass(frozen=True)
class Reasoned:
    """Steps of (tag, sentence without its full stop), the answer, and the faults made, joined by "+"."""

    steps: tuple[tuple[str, str], ...]
    answer: str
    fault: str


@dataclass(frozen=True)
class Reading:
    """What a prompt says: its task, the cues of its query, the trait that most of its profile items show.

    ``trait`` is "" without a profile, ``closing`` where no item shows a closing word.
    """

    task: str
    cues: tuple[str, ...]
    trait: str
    closing: str


def read(prompt: str) -> Reading:
    """Read an official LaMP prompt about this world, with a profile of any size or without one.

    Profile items whose words are not of this world are passed over (a cut item, say); the query must be
    readable.

    Raises:
        DataError: no task's template is found in the text, or the query's words are not of this world.
    """
    for task, template in _QUERIES.items():
        match = template.search(prompt)
        if match is None:
            continue
        if task == "lamp1":
            items = [found.groups() for found in re.finditer(r'"([^"]*)"', match["titles"])][:-1]
        else:
            items = [found.groups() for found in _ITEMS[task].finditer(prompt[: match.start()])]
        cues = match.groups()[1:] if task == "lamp1" else match.groups()
        if _known(task, cues):
            return Reading(task, tuple(cues), *_traits(task, items))
    start = " ".join(prompt.split())[-60:]
    raise DataError(
        f"prompt ending in {start!r}: not a MiniLaMP prompt. "
        "The simulated teacher reads only those; use a real one."
    )


def reason(prompt: str, rng: random.Random, faults: FaultRates) -> Reasoned:
    """Reason about a prompt as a fallible teacher: read the cues, take the profile's majority trait, answer.

    Without a profile it guesses (lamp1-3) or answers generically (lamp4/5/7).

    Raises:
        DataError: the text is not a MiniLaMP prompt.
    """
    reading = read(prompt)
    steps, answer, made = _SOLVERS.get(reading.task, _generate)(reading, rng, faults)
    if faults.verify and rng.random() < faults.verify:
        steps.append(("verify_conclusion", f"check that {answer} fits"))
    if rng.random() < faults.sloppy:
        made.append("sloppy")
        if rng.random() < 0.5:
            steps.insert(rng.randrange(1, len(steps) + 1), rng.choice(steps))
        else:
            steps.insert(rng.randrange(1, len(steps)), ("evaluate_reference", rng.choice(OFF_TOPIC)))
    return Reasoned(tuple(steps), answer, "+".join(made))


def untagged(steps: tuple[tuple[str, str], ...] | list[tuple[str, str]]) -> str:
    """The chain as plain sentences, joined by one space."""
    return " ".join(f"{sentence}." for _, sentence in steps)


def tagged(steps: tuple[tuple[str, str], ...] | list[tuple[str, str]]) -> str:
    """The chain as tagged segments, one a line."""
    return "\n".join(f"<{tag}> {sentence}. </{tag}>" for tag, sentence in steps)


def segment(reasoning: str) -> list[tuple[str, str]]:
    """Steps of an untagged chain: (tag, sentence without its full stop), as the simulated tagger sees them.

    A sentence outside the grammar is taken as ``evaluate_reference``. ``untagged(segment(x)) == x`` for any
    ``x`` of sentences that end in "." and are joined by one space.
    """
    body = reasoning.strip()
    sentences = body.removesuffix(".").split(". ") if body else []
    return [(_tag_of(sentence), sentence) for sentence in sentences]


def quality(prompt: str, reasoning: str, answer: str) -> tuple[int, int, int, int]:
    """The simulated judge: coherence, accuracy, completeness, relevance, 1-5 each (S8).

    It knows repetition, rambling, missing steps and a misread pattern, and is lenient about a chain that
    ignores the profile in lamp4/5/7: most of those pass, since that fault is RL's to mend. Deterministic. A
    total above 15 is kept.

    Raises:
        DataError: the text is not a MiniLaMP prompt.
    """
    reading = read(prompt)
    sentences = [sentence for _, sentence in segment(reasoning)]
    tags = {_tag_of(sentence) for sentence in sentences if _in_grammar(sentence)}
    rambling = sum(not _in_grammar(sentence) for sentence in sentences)
    repeated = len(sentences) - len(set(sentences))
    coherence, accuracy, completeness, relevance = 5, 5, 5, 5
    if repeated:
        coherence, relevance = 2, 2
    if rambling:
        coherence, relevance = 3, 1
    if len(tags) < 4:
        coherence, completeness = min(coherence, 3), max(len(tags), 1)
    if not _answers(reading, answer):
        coherence, accuracy = 1, 1
    elif reading.trait and not _follows(reading, sentences):
        if reading.task in STYLES:
            strict = zlib.crc32(f"{prompt}\n{reasoning}".encode()) % 10 < 2
            accuracy, completeness = (3, min(completeness, 2)) if strict else (4, min(completeness, 4))
        else:
            coherence, accuracy = min(coherence, 3), 2
    if repeated or rambling:
        accuracy = min(accuracy, 4)
    return coherence, accuracy, completeness, relevance


_QUERIES = {
    "lamp1": re.compile(
        r"the paper with the title(?P<titles>[^\n]*?), which reference is related\? [^\n]*?"
        r'\[1\]: "A (\w+) \w+" \[2\]: "A (\w+) \w+"'
    ),
    "lamp2": re.compile(r"Which tag does this movie relate to [^\n]*? description: A (\w+) and (\w+) film"),
    "lamp3": re.compile(r"What is the score of the following review [^\n]*? review: The \w+ is (\w+)"),
    "lamp4": re.compile(r"Generate a headline for the following article: The (\w+) (\w+) in town"),
    "lamp5": re.compile(r"Generate a title for the following abstract of a paper: We use (\w+) (\w+) here"),
    "lamp7": re.compile(r"Paraphrase the following tweet [^\n]*?: I am (\w+) about the (\w+)"),
}
_ITEMS = {
    "lamp2": re.compile(r'the tag for the movie: "A (\w+) and (\w+) film" is "([^"]*)"'),
    "lamp3": re.compile(r'([1-5]) is the score for "The \w+ is (\w+)"'),
    "lamp4": re.compile(r'"([^"]*)" is the title for "The \w+ \w+ in town"'),
    "lamp5": re.compile(r'"([^"]*)" is a title for "We use \w+ \w+ here"'),
    "lamp7": re.compile(r'"([^"]*)" (?=, and "| are written by a person)'),
}


def _known(task: str, cues: tuple[str, ...]) -> bool:
    if task == "lamp1":
        return all(cue in FIELD_OF for cue in cues)
    if task == "lamp2":
        return len(set(cues) & GENRE_OF.keys()) == 1 and len(set(cues) & ASPECT_OF.keys()) == 1
    if task == "lamp3":
        return cues[0] in LEVEL_OF
    return cues[0] in STYLES[task].subjects and cues[1] in STYLES[task].actions


def _traits(task: str, items: list[tuple[str, ...]]) -> tuple[str, str]:
    """The trait that most items show, and the closing word that most show ("" where none does)."""
    if task == "lamp1":
        words = [title.split() for (title,) in items]
        return majority([FIELD_OF[w[1]] for w in words if len(w) > 1 and w[1] in FIELD_OF]), ""
    if task == "lamp2":
        known = [item for item in items if _known(task, item[:2])]
        return majority(["genre" if tag in GENRES else "aspect" for *_, tag in known]), ""
    if task == "lamp3":
        gaps = [int(score) - LEVEL_OF[word] for score, word in items if word in LEVEL_OF]
        return majority([BIASES[gap] for gap in gaps if gap in BIASES]), ""
    style = STYLES[task]
    texts = [text.split() for (text, *_) in items]
    closings = [words[-1] for words in texts if words and words[-1] in style.closings]
    return majority([words[0] for words in texts if words and words[0] in style.openings]), majority(closings)


def _choose(
    reading: Reading, names: list[str], error_rate: float, rng: random.Random
) -> tuple[str, list[str]]:
    """The trait to go by: the profile's; another one at the error rate; any where there is no profile."""
    if not reading.trait:
        return rng.choice(names), []
    if rng.random() < error_rate:
        return rng.choice([name for name in names if name != reading.trait]), ["wrong_pattern"]
    return reading.trait, []


Solved = tuple[list[tuple[str, str]], str, list[str]]


def _reference(reading: Reading, rng: random.Random, faults: FaultRates) -> Solved:
    fields = [FIELD_OF[cue] for cue in reading.cues]
    made: list[str] = []
    if reading.trait in fields:
        field, made = _choose(reading, fields, faults.lamp1, rng)
    else:  # no profile, or one that is about neither reference
        field = rng.choice(fields)
    answer = f"[{fields.index(field) + 1}]"
    # The choice stands in the sentence of the comparison: a tiny model finds the index at a fixed distance, which
    # tags between sentences would change.
    steps = [
        ("identify_patterns", f"author likes {field}"),
        ("analyze_input", f"refs {reading.cues[0]} or {reading.cues[1]}"),
        ("compare_entities", f"{fields[0]}[1] but {fields[1]}[2] so {field}{answer}"),
        ("make_decision", f"pick {answer}"),
    ]
    return steps, answer, made


def _movie(reading: Reading, rng: random.Random, faults: FaultRates) -> Solved:
    genre_cue, aspect_cue = sorted(reading.cues, key=lambda cue: cue in ASPECT_OF)
    tags_by, made = _choose(reading, ["genre", "aspect"], faults.lamp2, rng)
    answer = GENRE_OF[genre_cue] if tags_by == "genre" else ASPECT_OF[aspect_cue]
    steps = [
        ("analyze_input", f"film with {genre_cue} and {aspect_cue}"),
        ("identify_patterns", f"user tags by {tags_by}"),
        (
            "evaluate_reference",
            f"{genre_cue} is {GENRE_OF[genre_cue]} but {aspect_cue} is {ASPECT_OF[aspect_cue]}",
        ),
        ("make_decision", f"pick {answer}"),
    ]
    return steps, answer, made


def _rating(reading: Reading, rng: random.Random, faults: FaultRates) -> Solved:
    (word,) = reading.cues
    mood, made = _choose(reading, list(BIASES.values()), faults.lamp3, rng)
    level = LEVEL_OF[word]
    answer = str(level + next(bias for bias, name in BIASES.items() if name == mood))
    steps = [
        ("analyze_input", f"review says {word} so {level}"),
        ("examine_examples", f"user is {mood}"),
        ("synthesize_findings", f"{level} and {mood} gives {answer}"),
        ("make_decision", f"pick {answer}"),
    ]
    return steps, answer, made


def _generate(reading: Reading, rng: random.Random, faults: FaultRates) -> Solved:
    style = STYLES[reading.task]
    subject, action = reading.cues
    made = ["lazy"] if reading.trait and rng.random() < faults.lazy else []
    opening = GENERIC_OPENING if made else reading.trait or GENERIC_OPENING
    closing = ""
    if rng.random() < faults.closing:
        closing = reading.closing or rng.choice(style.closings)
    steps = [
        ("analyze_input", f"about {subject} {action}"),
        ("identify_patterns", f"user {style.noun} start with {opening}"),
        ("synthesize_findings", f"join {opening} and {subject} {action}"),
        ("formulate_conclusion", f"end with {closing}" if closing else "write it"),
    ]
    return steps, compose(reading.task, opening, subject, action, closing), made


_SOLVERS = {"lamp1": _reference, "lamp2": _movie, "lamp3": _rating}

# First match wins. The grammar of the sentences above, and the tag of each.
_SENTENCES = (
    (re.compile(r"(refs \S+ or|film with|review says|about \S+) \S+( and \S+| so \d)?"), "analyze_input"),
    (re.compile(r"\S+\[1\] but \S+\[2\] so \S+\[[12]\]"), "compare_entities"),
    (re.compile(r"(author likes|user tags by|user \S+ start with) \S+"), "identify_patterns"),
    (re.compile(r"user is \S+"), "examine_examples"),
    (re.compile(r"\S+ is \S.* but \S+ is \S.*"), "evaluate_reference"),
    (re.compile(r"\d and \S+ gives \d|join \S+ and \S+ \S+"), "synthesize_findings"),
    (re.compile(r"pick \S.*"), "make_decision"),
    (re.compile(r"check that \S.* fits"), "verify_conclusion"),
    (re.compile(r"write it|end with \S+"), "formulate_conclusion"),
)


def _in_grammar(sentence: str) -> bool:
    return any(pattern.fullmatch(sentence) for pattern, _ in _SENTENCES)


def _tag_of(sentence: str) -> str:
    return next((tag for pattern, tag in _SENTENCES if pattern.fullmatch(sentence)), "evaluate_reference")


def _answers(reading: Reading, answer: str) -> bool:
    """Whether the answer is one that the query allows at all."""
    if reading.task == "lamp1":
        return answer in ("[1]", "[2]")
    if reading.task == "lamp2":
        return answer in {(GENRE_OF | ASPECT_OF)[cue] for cue in reading.cues}
    if reading.task == "lamp3":
        return answer in {str(LEVEL_OF[reading.cues[0]] + bias) for bias in BIASES}
    return set(reading.cues) <= set(answer.split())


def _follows(reading: Reading, sentences: list[str]) -> bool:
    """Whether the chain goes by the trait that the profile shows."""
    if reading.task == "lamp1" and reading.trait not in {FIELD_OF[cue] for cue in reading.cues}:
        return True
    says = (f"author likes {reading.trait}", f"user tags by {reading.trait}", f"user is {reading.trait}")
    return any(s in says or s.endswith(f" start with {reading.trait}") for s in sentences)
