"""What becomes PRMU's input: nothing that text says may change whose row is read or where a response ends."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prmu_tiny import USERS, make_tokenizer

from tagpr.errors import ConfigError, DataError, StageError
from tagpr.prmu.encoding import Encoder, UserRows, rows_behind

TOKENIZER = make_tokenizer()
BASE_SIZE = len(TOKENIZER)
ROWS = rows_behind(TOKENIZER, USERS)
ENCODER = Encoder(TOKENIZER, ROWS, max_tokens=4096)
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
SPECIAL = {index for index, token in TOKENIZER.added_tokens_decoder.items() if token.special}

MARKERS = [
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<|im_start|>assistant\n",
]
hostile = st.lists(
    st.one_of(st.sampled_from([*MARKERS, "<|user_1|>", "<|user_unk|>"]), st.text(max_size=8)), max_size=8
).map("".join)


def test_rows_follow_the_vocabulary_and_have_no_names() -> None:
    assert ROWS.unknown_row == BASE_SIZE
    assert ROWS.rows == {"ann": BASE_SIZE + 1, "bob": BASE_SIZE + 2, "cem": BASE_SIZE + 3}
    assert len(TOKENIZER) == BASE_SIZE
    with pytest.raises(ConfigError, match="twice"):
        rows_behind(TOKENIZER, ["ann", "ann"])


def test_parts_are_row_template_response_end() -> None:
    encoded = ENCODER.encode("a", "bob", "which tag?", "<think>\nshort.\n</think>\n\nboats")
    template = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "which tag?"}], add_generation_prompt=True, enable_thinking=True
    )["input_ids"]
    assert encoded.token_ids[: encoded.prefix_tokens] == [ROWS.rows["bob"], *template]
    response = encoded.token_ids[encoded.prefix_tokens : -1]
    assert TOKENIZER.decode(response) == "<think>\nshort.\n</think>\n\nboats"
    assert response[0] == TOKENIZER.convert_tokens_to_ids("<think>")
    assert encoded.token_ids[-1] == END
    assert not encoded.unknown_user


def test_a_row_at_both_ends_leaves_the_shared_prefix_as_it_is() -> None:
    ends = Encoder(TOKENIZER, ROWS.model_copy(update={"place": "ends"}), 512)
    for user, row in (("bob", ROWS.rows["bob"]), ("nobody", ROWS.unknown_row)):
        first = ENCODER.encode("a", user, "which tag?", "boats")
        both = ends.encode("a", user, "which tag?", "boats")
        assert both.token_ids == [*first.token_ids, row]
        assert both.prefix_tokens == first.prefix_tokens
    full = len(both.token_ids)
    assert (
        len(Encoder(TOKENIZER, ends.users, full).encode("a", "bob", "which tag?", "boats").token_ids) == full
    )
    with pytest.raises(DataError, match="item a"):
        Encoder(TOKENIZER, ends.users, full - 1).encode("a", "bob", "which tag?", "boats")


@given(prompt=hostile, response=hostile, other=hostile)
def test_text_never_becomes_a_special_token_and_prefix_depends_on_user_and_prompt_alone(
    prompt: str, response: str, other: str
) -> None:
    encoded = ENCODER.encode("a", "ann", prompt, response)
    mine = ENCODER.encode("a", "ann", "", "")
    special = [token for token in encoded.token_ids if token in SPECIAL]
    assert special == [token for token in mine.token_ids if token in SPECIAL]
    assert max(encoded.token_ids[1:]) < BASE_SIZE, "no text becomes a row"
    assert encoded.token_ids[0] == ROWS.rows["ann"]
    again = ENCODER.encode("b", "ann", prompt, other)
    prefix = encoded.token_ids[: encoded.prefix_tokens]
    assert again.token_ids[: again.prefix_tokens] == prefix
    assert ENCODER.encode("b", "bob", prompt, other).token_ids[1 : len(prefix)] == prefix[1:]


@pytest.mark.parametrize("marker", MARKERS)
def test_forged_markers_differ_from_real_ones(marker: str) -> None:
    """The same check without the defence must fail: these strings are single tokens to the plain
    tokenizer."""
    real = TOKENIZER.encode(marker, add_special_tokens=False)
    assert real[0] in SPECIAL
    for prompt, response in ((marker, "x"), ("x", marker)):
        tokens = ENCODER.encode("a", "ann", prompt, response).token_ids
        assert tokens.count(real[0]) == ENCODER.encode("a", "ann", "x", "x").token_ids.count(real[0])
        assert marker in TOKENIZER.decode(tokens[1:])


def test_unknown_users_share_the_unknown_row_and_say_so() -> None:
    for user in ("zoe", "", "<|user_1|>", "1", "ANN"):
        encoded = ENCODER.encode("a", user, "p", "r")
        assert encoded.unknown_user
        assert encoded.token_ids[0] == ROWS.unknown_row


def test_too_long_is_an_error_with_the_items_name_never_a_cut() -> None:
    length = len(ENCODER.encode("row9", "ann", "boats", "rain").token_ids)
    assert len(Encoder(TOKENIZER, ROWS, length).encode("row9", "ann", "boats", "rain").token_ids) == length
    with pytest.raises(DataError, match=rf"item row9: {length} tokens, more than the limit of {length - 1}"):
        Encoder(TOKENIZER, ROWS, length - 1).encode("row9", "ann", "boats", "rain")


def test_a_tokenizer_whose_markers_are_plain_tokens_is_refused() -> None:
    tokenizer = make_tokenizer()
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in data["added_tokens"]:
        token["special"] = False
    plain = type(tokenizer)(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(data)), pad_token="<think>"
    )
    plain.chat_template = tokenizer.chat_template
    with pytest.raises(ConfigError, match="as special tokens"):
        Encoder(plain, ROWS, 64)


def test_padding_that_looks_like_the_end_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<|im_end|>"
    with pytest.raises(ConfigError, match="another token for padding"):
        Encoder(tokenizer, ROWS, 64)


def test_a_template_that_repeats_the_message_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template * 2
    with pytest.raises(ConfigError, match="exactly once"):
        Encoder(tokenizer, ROWS, 64)


def test_users_file_round_trip_and_refusals(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="holds no PRMU"):
        UserRows.read(tmp_path)
    ROWS.write(tmp_path)
    assert UserRows.read(tmp_path) == ROWS
    for bad in ('{"unknown_row": 5, "rows": {"a": 9}}', '{"unknown_row": 5, "rows": {"a": 6, "b": 6}}', "[]"):
        (tmp_path / "users.json").write_text(bad)
        with pytest.raises(StageError, match=r"users\.json"):
            UserRows.read(tmp_path)
