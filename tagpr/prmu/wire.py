"""What travels between the reward server and its clients: plain records, no torch (S21).

Callers send text, never token ids: the server renders and tokenizes, so that nobody can inject a user row.
"""

import os
from pathlib import Path

from pydantic import Field, FiniteFloat, ValidationError

from tagpr.errors import ConfigError, RewardServerError
from tagpr.schema import Record

SCORE_PATH = "/v1/score"
HEALTH_PATH = "/health"
VERSION_PATH = "/version"
METRICS_PATH = "/metrics"
SWAP_PATH = "/admin/checkpoint"
TOKEN_VARIABLE = "TAGPR_PRMU_TOKEN"
ADMIN_TOKEN_VARIABLE = "TAGPR_PRMU_ADMIN_TOKEN"
MIN_TOKEN_CHARACTERS = 16

# The server's name for "the model gave no number for this item": asking again cannot help.
NOT_FINITE = "not_finite"
# ... and for "another checkpoint is served than the caller insists on".
OTHER_VERSION = "other_version"


class ScoreItem(Record):
    """One response to be scored; ``prompt`` is the user message (query and profile)."""

    id: str = Field(min_length=1, max_length=512)
    user_id: str = Field(min_length=1, max_length=512)
    prompt: str
    response: str


class ScoreRequest(Record):
    """Body of ``POST /v1/score``; ``versions`` are the checkpoints whose scores the caller takes (null: any)."""

    items: list[ScoreItem] = Field(min_length=1)
    versions: list[str] | None = None


class ItemScore(Record):
    """Score of one item; ``score`` is sigmoid(logit), eq. 3."""

    id: str
    logit: FiniteFloat
    score: FiniteFloat = Field(ge=0.0, le=1.0)
    unknown_user: bool


class ScoreResponse(Record):
    """Answer to ``POST /v1/score``: scores in the order of the items."""

    model_version: str
    scores: list[ItemScore]


class VersionInfo(Record):
    """Answer to ``GET /version``. ``users`` counts the rows of known users, without the unknown one."""

    model_version: str
    engine: str
    users: int
    max_tokens: int


class SwapRequest(Record):
    """Body of ``POST /admin/checkpoint``: the name of a folder in ``server.checkpoints``."""

    checkpoint: str = Field(min_length=1, max_length=128)


class SwapResponse(Record):
    """Answer to ``POST /admin/checkpoint``."""

    old_version: str
    model_version: str


class ErrorBody(Record):
    """Answer to a request that got no score: a stable ``code``, a line for people, the item to blame."""

    code: str
    message: str
    item: str | None = None


class Address(Record):
    """Content of ``server.json``, which a server writes once it is ready: where it is, what it serves.

    ``url`` is one address, or those of all replicas with commas between them, as :class:`RewardClient` takes it.
    """

    url: str
    model_version: str
    pid: int
    token_file: str | None = Field(
        default=None, description="set where the server reads its token from a file"
    )


def read_address(path: Path | str) -> Address:
    """Read a server's address file.

    Raises:
        RewardServerError: the file is missing (no server is ready) or is not an address.
    """
    try:
        return Address.model_validate_json(Path(path).read_bytes())
    except FileNotFoundError:
        raise RewardServerError(
            f"{path}: not there, no reward server is ready. Start one: bash recipes/serve_prmu.sh"
        ) from None
    except ValidationError as error:
        raise RewardServerError(
            f"{path}: is not the address of a reward server ({error.error_count()} errors). "
            "Delete it and start the server again."
        ) from None


def read_token(token_file: Path | str | None, variable: str = TOKEN_VARIABLE) -> str | None:
    """Token from a file, else from an environment variable (``TAGPR_PRMU_TOKEN``), else ``None``.

    Raises:
        ConfigError: the file cannot be read, or the token is too short or not fit for a header.
    """
    if token_file is not None:
        source = str(token_file)
        try:
            token = Path(token_file).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{source}: cannot be read as a token file ({type(error).__name__}). "
                f"Write the token into it, or unset the key and use {variable}."
            ) from None
    else:
        source = variable
        value = os.environ.get(variable)
        if value is None:
            return None
        token = value.strip()
    if len(token) < MIN_TOKEN_CHARACTERS or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"{source}: is no usable token. "
            f"Give {MIN_TOKEN_CHARACTERS} or more printable ASCII characters without a space."
        )
    return token
