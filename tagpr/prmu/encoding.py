"""PRMU's input: ``[user row] + chat-templated prompt + response + <|im_end|> (+ user row)`` as token ids (S17, S18).

Prompt and response are untrusted text. They are encoded with special tokens switched off, so that no text
can stand for another user's row, end the response early or open a new turn; the template around them is
encoded on its own. Tokens before the response depend on user and prompt alone, so a group of responses
shares a cacheable prefix.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Self

from pydantic import ValidationError, model_validator
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tagpr.errors import ConfigError, DataError, StageError
from tagpr.schema import Record

USERS_FILE = "users.json"
Place = Literal["first", "ends"]
"""Where the user row stands, see :class:`UserRows`."""
PLACES: tuple[Place, ...] = ("first", "ends")
END_TOKEN = "<|im_end|>"
TURN_TOKEN = "<|im_start|>"
# Stands for the message while the chat template is taken apart; letters only, so no template escapes it.
PLACEHOLDER = "TagPRMessageGoesHere"


class UserRows(Record):
    """Which row of the embedding table belongs to which user; ids without one share ``unknown_row``.

    The unknown row comes first and known users follow without a gap, so that later users are appended.
    """

    unknown_row: int
    rows: dict[str, int]
    # first: the row is the first token, and <|im_end|> the last, whose state the head reads. ends: the row is the last token as
    # well, so its own state is read: it asks the response what this user wants to know. A model of two layers cannot bring a row
    # at the start, the word it decides about and the end together. Prefixes are shared either way.
    place: Place = "first"

    @model_validator(mode="after")
    def _without_gap(self) -> Self:
        first = self.unknown_row + 1
        if sorted(self.rows.values()) != list(range(first, first + len(self.rows))):
            raise ValueError("rows of users are not consecutive after the unknown row")
        return self

    @property
    def end(self) -> int:
        """One past the last row."""
        return self.unknown_row + 1 + len(self.rows)

    def write(self, folder: Path) -> None:
        """Write ``users.json`` into a checkpoint folder."""
        (folder / USERS_FILE).write_text(self.model_dump_json(indent=0), "utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read ``users.json`` of a checkpoint folder.

        Raises:
            StageError: missing or malformed.
        """
        path = folder / USERS_FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise StageError(
                f"{path}: not there, this folder holds no PRMU. Run bash recipes/train_prmu.sh"
            ) from None
        except ValidationError as error:
            problem = error.errors(include_input=False, include_url=False)[0]["msg"]
            raise StageError(f"{path}: {problem}. Run bash recipes/train_prmu.sh again.") from None


class Encoded(NamedTuple):
    """Token ids of one input; the response starts at ``prefix_tokens``.

    The user row is ``token_ids[0]`` and, with ``UserRows.place`` "ends", ``token_ids[-1]``; no text becomes this id.
    """

    token_ids: list[int]
    prefix_tokens: int
    unknown_user: bool


def rows_behind(
    tokenizer: PreTrainedTokenizerBase, user_ids: Sequence[str], place: Place = "first"
) -> UserRows:
    """Rows for users behind all tokens of a tokenizer, the unknown row first.

    The rows get no names in the tokenizer: then no text whatever can stand for one, and a million users cost it nothing (it
    would take a minute to load a million tokens).

    Raises:
        ConfigError: a user is there twice.
    """
    first = len(tokenizer)
    rows = {user_id: first + 1 + place for place, user_id in enumerate(user_ids)}
    if len(rows) != len(user_ids):
        raise ConfigError("users: an id is there twice. Give each user one row.")
    return UserRows(unknown_row=first, rows=rows, place=place)


class Encoder:
    """Turns (user, prompt, response) into token ids. Safe to call from several threads.

    Args:
        tokenizer: a fast tokenizer with a chat template, ``<|im_start|>`` and ``<|im_end|>`` (Qwen3's, or
        the tiny one). users: rows of the users.
        max_tokens: of one whole input; a longer one is refused, never cut.

    Raises:
        ConfigError: the tokenizer cannot keep untrusted text apart from its own markers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, users: UserRows, max_tokens: int) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ConfigError("paths.prmu: has no fast tokenizer. Save the model with a tokenizer.json.")
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        markers = tokenizer.convert_tokens_to_ids([TURN_TOKEN, END_TOKEN])
        if not special.issuperset(markers) or tokenizer.pad_token_id in (None, markers[1]):
            raise ConfigError(
                f"paths.prmu: its tokenizer needs {TURN_TOKEN} and {END_TOKEN} as special tokens, "
                "and another token for padding. Use a tokenizer of Qwen3's kind."
            )
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": PLACEHOLDER}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
        parts = rendered.split(PLACEHOLDER)
        if len(parts) != 2:
            raise ConfigError(
                "paths.prmu: its chat template does not print the message exactly once. Mend the template."
            )
        self.users = users
        self.max_tokens = max_tokens
        self.pad_token_id: int = tokenizer.pad_token_id
        self._head, self._tail = (tokenizer.encode(part, add_special_tokens=False) for part in parts)
        self._end: int = markers[1]
        self._special = special
        # An own copy: the flag is a state of the tokenizer, which others may want the other way round.
        self._plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._plain.encode_special_tokens = True
        self._plain.no_padding()
        self._plain.no_truncation()

    def encode(self, item_id: str, user_id: str, prompt: str, response: str) -> Encoded:
        """Encode one input; a user without a row gets the unknown row.

        Raises:
            DataError: the input is longer than ``max_tokens``; names the item.
        """
        found = self.users.rows.get(user_id)
        row = self.users.unknown_row if found is None else found
        prefix = [row, *self._head, *self._untrusted(item_id, prompt), *self._tail]
        token_ids = [*prefix, *self._untrusted(item_id, response), self._end]
        if self.users.place == "ends":
            token_ids.append(row)
        if len(token_ids) > self.max_tokens:
            raise DataError(
                f"item {item_id}: {len(token_ids)} tokens, more than the limit of {self.max_tokens}. "
                "Shorten the prompt or the response, or raise max_tokens."
            )
        return Encoded(token_ids, len(prefix), found is None)

    def _untrusted(self, item_id: str, text: str) -> list[int]:
        token_ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        if not self._special.isdisjoint(token_ids):  # no tokenizer known to us does this; then no score
            raise DataError(f"item {item_id}: its text became special tokens. Use another tokenizer.")
        return token_ids
