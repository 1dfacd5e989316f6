"""Grammar of tagged reasoning, shape of a response, neutralising of untrusted text (S11, S24, S26)."""

import re
import time
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tagpr.errors import ConfigError, DataError
from tagpr.tags import (
    check_tags,
    format_response,
    neutralise,
    parse_segments,
    split_response,
    strip_tags,
)
from tagpr.vocabulary import DEFINITIONS

TAGS = tuple(DEFINITIONS)

GOOD = (
    "<analyze_input> The user asks for a tag. </analyze_input>\n"
    "<examine_examples> Item 2 is an old film. 3 < 4 and <3. </examine_examples>\n"
    "<make_decision> Classic. </make_decision>"
)

# Pieces that tags are made of, so that random texts come close to the grammar.
pieces = st.sampled_from(
    ["<", ">", "/", "</", "|", "<|", "|>", " ", "\n", "\n\n", "\t", "think", "THINK", "thinK", "im_end", "｜"]
    + [
        "<think>",
        "</think>",
        "<|im_end|>",
        "< /Think >",
        "<b>",
        "<br/>",
        "<3",
        "a < b",
        "Tekst.",
        "é",
        "\x1c",
    ]
    + [f"<{tag}>" for tag in TAGS[:3]]
    + [f"</{tag}>" for tag in TAGS[:3]]
    + ["analyze_input", "< analyze_input >", "<Analyze_Input>", "</ make_decision>", "tool_call", "0"]
)
texts = st.one_of(st.lists(pieces, max_size=25).map("".join), st.text(max_size=60))
sentences = st.lists(
    st.text("abc XYZ.,'<3&é", min_size=1, max_size=20).map(lambda s: s.replace("<", "< ").strip() or "Yes."),
    min_size=1,
    max_size=8,
).map(lambda parts: [" ".join(part.split()) for part in parts])


def test_the_nine_tags_are_defined() -> None:
    assert len(TAGS) == 9
    assert all(len(text.splitlines()) == 1 and text for text in DEFINITIONS.values())


def test_good_reasoning_is_read() -> None:
    parsed = parse_segments(GOOD)
    assert parsed.problem == ""
    assert [tag for tag, _ in parsed.segments] == ["analyze_input", "examine_examples", "make_decision"]
    assert parsed.segments[1][1] == "Item 2 is an old film. 3 < 4 and <3."
    assert check_tags(GOOD) == ""


@pytest.mark.parametrize(
    ("reasoning", "problem"),
    [
        ("", "too_few_segments"),
        ("no tags here", "text_outside_tags"),
        ("<analyze_input> a", "tag_unclosed"),
        ("<analyze_input> a </make_decision>", "tag_mismatch"),
        ("<analyze_input> a <make_decision> b </make_decision> </analyze_input>", "tag_nested"),
        ("</analyze_input> a", "tag_unopened"),
        ("<invented> a </invented>", "tag_unknown"),
        ("<Analyze_Input> a </Analyze_Input>", "tag_unknown"),
        ("<analyze_input> some <b>bold</b> </analyze_input>", "tag_unknown"),
        ("<analyze_input> a </analyze_input> stray", "text_outside_tags"),
        ("stray <analyze_input> a </analyze_input>", "text_outside_tags"),
        ("< analyze_input> a </analyze_input>", "text_outside_tags"),
        (GOOD + "<verify_conclusion>", "tag_unclosed"),
        (GOOD + "</think>", "tag_unknown"),
        ("<analyze_input> a </analyze_input>" * 2, "too_few_segments"),
        (
            "<analyze_input> a </analyze_input>" * 2 + "<make_decision> \n </make_decision>",
            "too_few_segments",
        ),
    ],
)
def test_each_problem_is_named(reasoning: str, problem: str) -> None:
    assert check_tags(reasoning) == problem


def test_plain_text_that_looks_like_markup_is_text() -> None:
    for text in ("3 < 4", "<3", "<br/>", '<a href="x">', "x <-> y", "<>", "</>", "<1st>", "a<b"):
        assert check_tags(GOOD.replace("Classic.", text)) == "", text


def test_vocabulary_and_minimum_are_parameters() -> None:
    assert check_tags("<a> x </a><b> y </b>", minimum=2, vocabulary=("a", "b")) == ""
    assert check_tags("<a> x </a><b> y </b>", vocabulary=("a", "b")) == "too_few_segments"
    assert check_tags(GOOD, vocabulary=("a", "b")) == "tag_unknown"
    assert strip_tags("<a>x</a> <think>", vocabulary=("a",)) == "x <think>"
    assert neutralise("<a> <make_decision>", vocabulary=("a",)) == "‹a› <make_decision>"


@pytest.mark.parametrize("vocabulary", [(), ("a", "a"), ("a b",), ("think",), ("Think",), ("<a>",)])
def test_a_vocabulary_that_cannot_work_is_refused(vocabulary: tuple[str, ...]) -> None:
    for function in (parse_segments, strip_tags, neutralise, split_response):
        with pytest.raises(ConfigError, match="tags"):
            function("x", vocabulary=vocabulary)


@given(sentences, st.sampled_from([" ", "\n", "\n  ", ""]), st.sampled_from([" ", "\n"]), st.data())
def test_tagging_then_stripping_gives_the_source(
    source: list[str], between: str, inside: str, data: st.DataObject
) -> None:
    tags = [data.draw(st.sampled_from(TAGS)) for _ in source]
    tagged = between.join(
        f"<{tag}>{inside}{text}{inside}</{tag}>" for tag, text in zip(tags, source, strict=True)
    )
    parsed = parse_segments(tagged)
    assert parsed.problem == ""
    assert parsed.segments == list(zip(tags, source, strict=True))
    assert strip_tags(tagged) == " ".join(source)


def test_stripping_keeps_paragraphs_and_makes_no_new_tag() -> None:
    assert (
        strip_tags("<make_decision>a\n\nb</make_decision>\n\n<make_decision>c</make_decision>")
        == "a\n\nb\n\nc"
    )
    assert strip_tags("<make<make_decision>_decision>") == "<make _decision>"


@given(texts)
def test_stripping_is_idempotent_and_loses_only_tags_and_space(text: str) -> None:
    stripped = strip_tags(text)
    assert strip_tags(stripped) == stripped
    without = re.sub("|".join(f"</?{tag}>" for tag in TAGS), "", text)
    assert "".join(stripped.split()) == "".join(without.split())


@given(texts)
def test_a_text_without_problem_is_exactly_its_segments(text: str) -> None:
    parsed = parse_segments(text)
    if not parsed.problem:
        rebuilt = "".join(f"<{tag}>{body}</{tag}>" for tag, body in parsed.segments)
        assert "".join(rebuilt.split()) == "".join(text.split())


GOOD_RESPONSE = f"<think>\n{GOOD}\n</think>\n\nclassic"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (GOOD_RESPONSE, ""),
        (GOOD_RESPONSE + "<|im_end|>", ""),
        (GOOD_RESPONSE + " <|im_end|>\n", ""),
        ("\n " + GOOD_RESPONSE + "\n", ""),
        ("<think>a</think>b", ""),
        ("<think>a</think>A <i>new</i> method for x < 3", ""),
        ("", "empty_response"),
        ("<|im_end|>", "empty_response"),
        ("classic", "no_think"),
        ("<think>\na\n</think>\n\n", "empty_answer"),
        ("<think>\na\n</think>\n\n<|im_end|>", "empty_answer"),
        ("<think>\n\n</think>\n\nb", "empty_reasoning"),
        ("Sure. " + GOOD_RESPONSE, "think_not_first"),
        ("</think> a <think> b", "think_not_first"),
        ("<think> a", "think_unclosed"),
        ("a </think> b", "think_unopened"),
        (GOOD_RESPONSE * 2, "several_thinks"),
        ("<think><think>a</think>b", "several_thinks"),
        ("<think>a</think></think>b", "several_thinks"),
        (GOOD_RESPONSE + "<|im_end|><|im_end|>", "control_token"),
        ("<think>a<|im_start|></think>b", "control_token"),
        ("<think>a</think><make_decision>b</make_decision>", "tag_in_answer"),
        ("<think>a</think>b < / Make_Decision >", "tag_in_answer"),
        ("<think>a</think>< think >b", "tag_in_answer"),
    ],
)
def test_responses(text: str, problem: str) -> None:
    response = split_response(text)
    assert response.problem == problem
    if text.startswith(GOOD_RESPONSE) and not problem:
        assert (response.reasoning, response.answer) == (GOOD, "classic")
    if problem.startswith(("no_think", "several", "think_", "empty_response")):
        assert (response.reasoning, response.answer) == ("", "")


@given(texts, texts)
@example("0", "<<|im_end|>")
def test_formatting_reads_back_or_refuses(reasoning: str, answer: str) -> None:
    try:
        text = format_response(reasoning, answer)
    except DataError:
        read = split_response(f"<think>\n{reasoning}\n</think>\n\n{answer}")
        assert read.problem or answer.strip().endswith("<|im_end|>")
        return
    response = split_response(text)
    assert (response.reasoning, response.answer) == (reasoning.strip(), answer.strip())
    assert split_response(text + "<|im_end|>") == response


def test_formatting_is_the_agreed_text() -> None:
    assert format_response(" a \n", " b") == "<think>\na\n</think>\n\nb"
    with pytest.raises(DataError, match="empty_answer"):
        format_response("a", " ")


@given(texts)
def test_neutralised_text_is_harmless(text: str) -> None:
    clean = neutralise(text)
    assert neutralise(clean) == clean
    assert len(clean) == len(text)
    assert "<|" not in clean
    for variant in (
        clean,
        clean.lower(),
        clean.casefold(),
        "".join(clean.split()),
        clean.lower().replace(" ", ""),
    ):
        for name in ("think", "tool_call", *TAGS):
            assert f"<{name}>" not in variant
            assert f"</{name}>" not in variant
    assert check_tags(clean, minimum=0) in ("", "text_outside_tags", "tag_unknown")
    assert split_response(f"<think>a</think>{clean}").problem in ("", "empty_answer")
    # Nothing changed but brackets of marks.
    assert clean.replace("‹", "<").replace("›", ">") == text.replace("‹", "<").replace("›", ">")


@pytest.mark.parametrize(
    "text",
    [
        "I <3 it",
        "a < b > c",
        "<b>bold</b>",
        "<br/>",
        "x|y",
        "5 <= 6",
        "thinking",
        "<thinking>",
        "‹quoted›",
        "",
    ],
)
def test_neutralising_leaves_ordinary_text_alone(text: str) -> None:
    assert neutralise(text) == text


def test_neutralising_stays_close() -> None:
    assert neutralise("<|im_end|></think> < /THINK > <make_decision/>") == (
        "‹|im_end|>‹/think› ‹ /THINK › ‹make_decision/›"
    )


ADVERSARIAL = {
    "open brackets": "<" * 1_000_000,
    "bracket and space": "<" + " " * 1_000_000,
    "spaces": " " * 1_000_000,
    "spaced slashes": "< / " * 250_000,
    "long name": "<" + "a" * 1_000_000,
    "half tags": "<analyze_input" * 70_000,
    "opening tags": "<analyze_input>" * 66_000,
    "closing tags": "</analyze_input>" * 62_000,
    "segments": "<analyze_input>a</analyze_input>" * 31_000,
    "spaced thinks": "<think" + " " * 999_000 + "x",
    "thinks": "<think>" * 140_000,
    "controls": "<|" * 500_000,
    "half controls": "<|a" * 330_000,
    "one long control": "<|" + "a" * 1_000_000,
    "gaps": "<analyze_input>" + "\n" * 500_000 + "</analyze_input>" + "\n" * 500_000,
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_a_megabyte_takes_well_under_a_second(name: str) -> None:
    whole = ADVERSARIAL[name]
    functions: tuple[Callable[[str], object], ...] = (check_tags, strip_tags, neutralise, split_response)
    # A part comes first, so that a quadratic parser fails within seconds instead of running for hours.
    for text, limit in ((whole[:10_000], 0.1), (whole, 1.0)):
        for function in functions:
            start = time.process_time()
            function(text)
            function(f"<think>{text}</think>{text}")
            assert time.process_time() - start < limit, function
