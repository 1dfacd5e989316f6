"""Prompt and tagged response as one token sequence, with loss on the response only (eq. 4, S22)."""

from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq
import torch
from torch.utils.data import Dataset

from tagpr.errors import DataError


def encode(tokenizer: Any, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Token ids and loss mask of one training row.

    The prompt is tokenized as in a rollout (chat template, thinking on, generation prompt), the response as what the policy has
    to write after it: ``<think>...</think>``, the answer, end of turn. Templating the assistant's turn instead can drop
    ``<think>`` (Qwen3's template does, for all but the last turn).

    Returns:
        (ids, mask), both of length prompt + response; mask is 0 on the prompt and 1 on the response and its end-of-turn.
    """
    messages = [{"role": "user", "content": prompt}]
    prompt_ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=True, return_dict=False
    )
    response_ids = [*tokenizer.encode(response, add_special_tokens=False), tokenizer.eos_token_id]
    return [*prompt_ids, *response_ids], [0] * len(prompt_ids) + [1] * len(response_ids)


class TaggedChainDataset(Dataset):
    """Rows of ``sft.parquet`` for verl's SFT trainer (``data.custom_cls``).

    Items are ``input_ids``, ``position_ids``, ``loss_mask``, each of shape (tokens,), int64, unpadded
    (``data.pad_mode=no_padding``).

    Raises:
        DataError: a file lacks a column, or a row is longer than ``data.max_length``; nothing is cut.
    """

    def __init__(
        self,
        parquet_files: str | Sequence[str],
        tokenizer: Any,
        config: Any,
        processor: Any = None,
        max_samples: int = -1,
    ) -> None:
        files = [parquet_files] if isinstance(parquet_files, str) else list(parquet_files)
        self.rows: list[tuple[list[int], list[int]]] = []
        for file in files:
            table = pq.read_table(file)
            for column in ("id", "prompt", "response"):
                if column not in table.column_names:
                    raise DataError(
                        f"{file}: has no column {column!r}. Make it with `bash recipes/build_chains.sh`."
                    )
            for row in table.select(["id", "prompt", "response"]).to_pylist():
                ids, mask = encode(tokenizer, row["prompt"], row["response"])
                if len(ids) > config.max_length:
                    raise DataError(
                        f"{file}: row {row['id']} has {len(ids)} tokens, more than data.max_length={config.max_length}. "
                        "Raise data.max_length, or drop the row."
                    )
                self.rows.append((ids, mask))
        if max_samples > 0:
            self.rows = self.rows[:max_samples]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids, mask = self.rows[index]
        return {
            "input_ids": torch.tensor(ids),
            "position_ids": torch.arange(len(ids)),
            "loss_mask": torch.tensor(mask),
        }
