"""Example -> chat prompt: the same text and the same budget for every method that is compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tagpr.benchmarks.prompt import build_prompt
from tagpr.dense_retrieval import install
from tagpr.errors import ConfigError, StageError
from tagpr.schema import Example
from tagpr.tags import THINK_CLOSE, THINK_OPEN


@dataclass(frozen=True)
class PromptSettings:
    """How an example becomes a prompt (``benchmark`` in the configuration); budgets in the tokenizer's tokens.

    ``thinking_tokens`` ends the reasoning after so many; None: only ``max_response_tokens`` does.
    """

    profile_size: int
    retriever: str
    max_prompt_tokens: int
    max_response_tokens: int
    seed: int
    thinking_tokens: int | None = None
    retriever_model: str | None = None


@dataclass(frozen=True)
class RenderedPrompt:
    """The prompt of one example: its text, and the token ids that the chat template makes of it."""

    text: str
    token_ids: tuple[int, ...]
    items_used: int
    items_shortened: int


class PromptRenderer:
    """Example -> chat prompt of one user message, as in training; ``thinking`` is the template's ``enable_thinking``.

    ``opens_thinking`` says that the template itself writes ``<think>``, so that no response contains it.
    """

    def __init__(self, model: str, settings: PromptSettings, thinking: bool = True) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise StageError(
                f"{model}: its tokenizer cannot be loaded ({error}). Use a Hugging Face model folder."
            ) from None
        if not self.tokenizer.chat_template:
            raise ConfigError(f"{model}: its tokenizer has no chat template. Use a chat model's folder.")
        install(settings.retriever, settings.retriever_model)
        self.settings = settings
        self.thinking = thinking
        # What the template adds for a method without thinking must not cost it words that the others are shown.
        self._not_counted = len(self.encode("")) - len(self.encode("", thinking=True))
        self.opens_thinking = thinking and self.decode(self.encode("")).rstrip().endswith(THINK_OPEN)

    def encode(self, prompt: str, thinking: bool | None = None) -> list[int]:
        """Token ids of the whole conversation up to where the model begins."""
        ids: list[int] = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            enable_thinking=self.thinking if thinking is None else thinking,
            tokenize=True,
            return_dict=False,
        )
        return ids

    def render(self, example: Example) -> RenderedPrompt:
        """Select, neutralise and fit the profile; the budget counts the chat template's own tokens too, as with thinking.

        Raises:
            QueryTooLongError: the query alone does not fit.
        """
        prompt = build_prompt(
            example,
            self.settings.profile_size,
            self.settings.retriever,
            lambda text: len(self.encode(text)) - self._not_counted,
            self.settings.max_prompt_tokens,
            seed=self.settings.seed,
        )
        return RenderedPrompt(
            prompt.text, tuple(self.encode(prompt.text)), prompt.items_used, prompt.items_shortened
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids as the reward sees it in training: special tokens inside it stay, and break its format."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def response_text(self, text: str) -> str:
        """A response in full: with the ``<think>`` that stands in the prompt where the template writes it (S6)."""
        if self.opens_thinking and THINK_OPEN not in text:
            return f"{THINK_OPEN}\n{text.lstrip()}"
        return text

    def response_ids(self, text: str) -> list[int]:
        """Tokens of a response that came as text."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def reasoning_tokens(self, response: str, total: int) -> int:
        """Tokens before ``</think>``; where it never came, all of it is reasoning (S38), or none if there is no thinking."""
        before, mark, _ = response.partition(THINK_CLOSE)
        if not mark:
            return total if self.thinking else 0
        thought = before.partition(THINK_OPEN)[2] or before
        return len(self.tokenizer.encode(thought.strip(), add_special_tokens=False))
