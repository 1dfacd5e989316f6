"""A small byte-level BPE tokenizer with Qwen3's special tokens, pre-tokenization and chat contract.

It encodes any Unicode text and gives it back unchanged. MiniLaMP's texts are short in it: the words of that
world are learned, and the tags and the fixed phrases of LaMP's prompts are single, *non-special* tokens.
``<think>`` and ``</think>`` are non-special too, as in Qwen3: a decoder that skips special tokens keeps them.
"""

import random
import re
from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tagpr.benchmarks.lamp import MOVIE_TAGS
from tagpr.benchmarks.minilamp.generate import draw
from tagpr.benchmarks.minilamp.reader import FaultRates, reason, untagged
from tagpr.benchmarks.minilamp.world import TASK_NAMES, population
from tagpr.tags import END_OF_TURN, THINK_CLOSE, THINK_OPEN, vocabulary

END_OF_TEXT = "<|endoftext|>"
START_OF_TURN = "<|im_start|>"
MAX_POSITIONS = 4096

# Qwen3's pre-tokenization: unlike GPT-2's it keeps runs of line breaks together.
_PIECES = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What LaMP's prompts always say: one token each, or prompts are more than twice as long.
_PHRASES = (
    "For an author who has written the paper with the title",
    '", which reference is related? Just answer with [1] or [2] without explanation. [1]: "',
    '" [2]: "',
    "[1]",
    "[2]",
    ', and "',
    "Which tag does this movie relate to among the following tags? Just answer with the tag name without "
    f"further explanation. tags: [{', '.join(MOVIE_TAGS)}] description: ",
    'the tag for the movie: "',
    '" , and the tag for the movie: "',
    '" is "',
    "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 "
    "without further explanation. review: ",
    ' is the score for "',
    "Generate a headline for the following article: ",
    '" is the title for "',
    '" , and "',
    '" . ',
    "Generate a title for the following abstract of a paper: ",
    '" is a title for "',
    ". Following the given patterns ",
    "Paraphrase the following tweet without any explanation before or after it: ",
    " are written by a person. Following the given patterns ",
)

_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('role ' ~ message.role ~ ': not one of system, user, assistant') -}}
{%- endif -%}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}
"""


def build_tokenizer(seed: int, users: int = 80, learned: int = 990) -> PreTrainedTokenizerFast:
    """Learn ``learned`` pieces from the text of MiniLaMP's training users, then add tags and phrases.

    The same arguments give the same tokenizer. ``eos_token`` is ``<|im_end|>``, ``pad_token``
    ``<|endoftext|>``.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, START_OF_TURN, END_OF_TURN]
    trainer = trainers.BpeTrainer(
        vocab_size=learned,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed, users), trainer)
    plain = [THINK_OPEN, THINK_CLOSE]
    for tag in vocabulary():
        # With its space: a closing tag follows ". " in the one form that chains are written in.
        plain += [f"<{tag}>", f"</{tag}>", f" </{tag}>"]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (*plain, *_PHRASES)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[START_OF_TURN],
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
        chat_template=_CHAT_TEMPLATE,
    )


def _corpus(seed: int, users: int) -> Iterator[str]:
    """What stands between phrases and marks; a sentence once after a line break, once after a tag."""
    rng = random.Random(f"tokenizer of world {seed}")
    phrases = re.compile("|".join(map(re.escape, sorted(_PHRASES, key=len, reverse=True))))
    for user in population(seed, users) * 4:
        for task in TASK_NAMES:
            prompt, gold = draw(task, user, rng)
            reasoned = reason(prompt, rng, FaultRates())
            yield from phrases.split(f"user\n{prompt}")
            yield from phrases.split(f"assistant\n{untagged(reasoned.steps)}\n")
            yield from (text for _, sentence in reasoned.steps for text in phrases.split(f" {sentence}."))
            yield from (f"\n\n{gold}", f"\n\n{reasoned.answer}")
