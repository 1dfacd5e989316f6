"""The SIMULATED tagger for MiniLaMP: restricted tagging in both modes, and exploratory tagging with noisy free tags.

It reads nothing but the prompt: the sentences, whose grammar tells their purpose, and the list of tags with definitions. It
knows nine kinds of step, and takes the listed tag that is worded most alike where a kind is not listed by its name.
"""

import json
import random
import re

from rapidfuzz import fuzz

from data_pipeline.exploratory import PROMPT_FIELDS as EXPLORATORY_FIELDS
from data_pipeline.prompts import PromptTemplate
from data_pipeline.settings import PromptFiles, SimulatedFaults
from data_pipeline.tagging import PROMPT_FIELDS, SPAN_PROMPT_FIELDS
from tagpr.benchmarks.minilamp import reader
from tagpr.errors import DataError
from tagpr.vocabulary import DEFINITIONS

_LISTED = re.compile(r"^- ([\w-]+): (.+)$", re.MULTILINE)
_NUMBERED = re.compile(r"^[0-9]+\| (.+)$", re.MULTILINE)

# How different annotators might name the nine kinds of step without having seen each other's names.
FREE_TAGS = {
    "analyze_input": (
        "analyze input", "input analysis", "understand the question", "parse task", "problem restatement",
        "clarify request",
    ),
    "examine_examples": (
        "examine examples", "example examination", "review history", "look at past items", "profile inspection",
    ),
    "identify_patterns": (
        "identify pattern", "pattern recognition", "find regularity", "infer preference", "spot user trend",
    ),
    "evaluate_reference": (
        "evaluate reference", "reference check", "assess candidate", "weigh evidence", "external source review",
    ),
    "compare_entities": (
        "compare entities", "entity comparison", "contrast options", "side by side comparison", "weigh alternatives",
    ),
    "synthesize_findings": (
        "synthesize findings", "finding synthesis", "combine evidence", "integrate information", "put together",
    ),
    "make_decision": ("make decision", "decision making", "choose option", "select answer", "final choice"),
    "verify_conclusion": ("verify conclusion", "conclusion verification", "double check", "sanity check", "validate answer"),
    "formulate_conclusion": (
        "formulate conclusion", "conclusion formulation", "write output", "compose answer", "phrase response",
    ),
}  # fmt: skip
_PURPOSES = {
    "analyze_input": ("restates what is asked", "reads the query and notes what is given", "sets out the problem"),
    "examine_examples": ("looks at items of the history", "goes through earlier items one by one", "inspects the profile"),
    "identify_patterns": ("states what several items share", "names the habit behind the items", "derives a regularity"),
    "evaluate_reference": ("weighs one reference", "checks the input against a source", "judges a single candidate"),
    "compare_entities": ("sets candidates side by side", "contrasts two options", "says how options differ"),
    "synthesize_findings": ("joins the findings", "draws the evidence together", "combines what was found"),
    "make_decision": ("settles on one option", "picks the answer", "commits to a choice"),
    "verify_conclusion": ("checks the choice again", "makes sure that the answer fits", "tests the conclusion"),
    "formulate_conclusion": ("words the final answer", "decides how the output is written", "phrases the result"),
}  # fmt: skip
_PURPOSE_OPENINGS = ("", "", "this step ", "here the model ", "the segment ", "a part that ")
_PURPOSE_ENDINGS = (
    "",
    "",
    "",
    " before going on",
    " for this user",
    " in one sentence",
    " as a step towards the answer",
)
_VAGUE = ("reasoning", "reasoning step", "thinking", "next step", "intermediate step")


class SimulatedTagger:
    """Replies as text, a share of them faulty, as functions of (prompt, random numbers).

    Raises:
        ConfigError: a prompt file cannot be used.
    """

    def __init__(self, prompts: PromptFiles, faults: SimulatedFaults) -> None:
        self._faults = faults
        self._paper = PromptTemplate.load(
            "chains.prompts.restricted_tagging", prompts.restricted_tagging, PROMPT_FIELDS
        )
        self._span = PromptTemplate.load(
            "chains.prompts.span_tagging", prompts.span_tagging, SPAN_PROMPT_FIELDS
        )
        self._exploratory = PromptTemplate.load(
            "chains.prompts.exploratory_tagging", prompts.exploratory_tagging, EXPLORATORY_FIELDS
        )

    def reply(self, prompt: str, rng: random.Random) -> str:
        """Answer one prompt.

        Raises:
            DataError: it is none of the tagger's prompts.
        """
        if values := self._paper.extract(prompt):
            steps = reader.segment(values["chain_of_thought"])
            return self._rewritten(steps, _by_kind(values["definitions"]), rng)
        if values := self._span.extract(prompt):
            kinds = _kinds(values["numbered_chain"])
            return self._spans(kinds, _by_kind(values["definitions"]), rng)
        if values := self._exploratory.extract(prompt):
            return self._free(_kinds(values["numbered_chain"]), rng)
        raise DataError("prompt: is none of the tagger's prompts.")

    def _fault(self, rng: random.Random) -> str:
        draw = rng.random()
        for name, rate in (
            ("unknown", self._faults.tag_unknown),
            ("rewritten", self._faults.tag_rewritten),
            ("unclosed", self._faults.tag_unclosed),
        ):
            if 0.0 <= draw < rate:
                return name
            draw -= rate
        return ""

    def _rewritten(self, steps: list[tuple[str, str]], names: dict[str, str], rng: random.Random) -> str:
        lines = [f"<{names[kind]}> {text}. </{names[kind]}>" for kind, text in steps]
        line = rng.randrange(len(lines)) if lines else 0
        fault = self._fault(rng)
        if fault and lines:
            lines[line] = _spoil(lines[line], fault)
        return "\n".join(lines)

    def _spans(self, kinds: list[str], names: dict[str, str], rng: random.Random) -> str:
        spans = [
            {"first": number, "last": number, "tag": names[kind]}
            for number, kind in enumerate(kinds, start=1)
        ]
        return self._spoilt(spans, rng)

    def _free(self, kinds: list[str], rng: random.Random) -> str:
        spans = []
        for number, kind in enumerate(kinds, start=1):
            if rng.random() < self._faults.free_tag_wrong:
                kind = rng.choice(list(FREE_TAGS))
            vague = rng.random() < self._faults.free_tag_vague
            name = rng.choice(_VAGUE if vague else FREE_TAGS[kind])
            purpose = "thinks about it" if vague else rng.choice(_PURPOSES[kind])
            purpose = f"{rng.choice(_PURPOSE_OPENINGS)}{purpose}{rng.choice(_PURPOSE_ENDINGS)}"
            spans.append({"first": number, "last": number, "tag": _spelled(name, rng), "purpose": purpose})
        return self._spoilt(spans, rng)

    def _spoilt(self, spans: list[dict[str, object]], rng: random.Random) -> str:
        """The faults of paper mode in the other form: a foreign tag, a line left out, a reply that breaks off."""
        line = rng.randrange(len(spans)) if spans else 0
        fault = self._fault(rng)
        if fault == "unknown" and spans:
            spans[line]["tag"] = "<think_hard>"
        if fault == "rewritten" and spans:
            del spans[line]
        text = json.dumps({"segments": spans})
        return text[: len(text) // 2] if fault == "unclosed" else text


def _kinds(numbered: str) -> list[str]:
    """The kind of each line: that of its first sentence."""
    return [steps[0][0] if (steps := reader.segment(line)) else "" for line in _NUMBERED.findall(numbered)]


def _by_kind(definitions: str) -> dict[str, str]:
    """Kind of step -> listed tag: of the kind's own name, or one that this tagger itself would use for it, or the likest."""
    listed = dict(_LISTED.findall(definitions))
    if not listed:
        raise DataError("prompt: lists no tags.")

    def best(kind: str) -> str:
        wording = f"{kind} {DEFINITIONS[kind]}".replace("_", " ")

        def fit(tag: str) -> tuple[bool, bool, float]:
            words = tag.replace("_", " ").lower()
            likeness = fuzz.token_set_ratio(wording, f"{words} {listed[tag]}")
            return tag == kind, words in FREE_TAGS[kind], likeness

        return max(listed, key=fit)

    return {kind: best(kind) for kind in DEFINITIONS}


def _spoil(line: str, fault: str) -> str:
    if fault == "unknown":
        return re.sub(r"(</?)[\w-]+>", r"\1think_hard>", line)
    if fault == "rewritten":
        return line.replace(". <", ", surely. <")
    return re.sub(r" </[\w-]+>", "", line)


def _spelled(name: str, rng: random.Random) -> str:
    """A name in one of the ways that models spell names: case, separators, number, an article more."""
    words = name.split()
    if rng.random() < 0.15:
        words[-1] += "s" if not words[-1].endswith("s") else ""
    if rng.random() < 0.1 and len(words) > 1:
        words.insert(1, rng.choice(("the", "a")))
    text = rng.choice((" ", " ", "_", "_", "-")).join(words)
    return rng.choice((text, text, text.title(), text.upper(), text.capitalize()))
