"""Where a training run of PRMU can go on from: safetensors and JSON, each checkpoint whole or not there."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tagpr.errors import StageError
from tagpr.prmu.rows import RowTable

STATE_FILE = "state.json"


def save_state(
    folder: Path,
    step: int,
    fingerprint: str,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    rows: RowTable,
) -> None:
    """Write ``folder/step_<step>`` in one step, then remove older ones."""
    fresh = folder / f".step_{step}.{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    weights = {name: value.detach().contiguous() for name, value in model.named_parameters()}
    save_file(weights, fresh / "model.safetensors")
    save_file(rows.state(), fresh / "rows.safetensors")
    moments = {
        f"{number}.{name}": value.contiguous()
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    save_file(moments, fresh / "optimizer.safetensors")
    (fresh / STATE_FILE).write_text(json.dumps({"step": step, "fingerprint": fingerprint}), "utf-8")
    for path in fresh.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    final = folder / f"step_{step}"
    shutil.rmtree(final, ignore_errors=True)
    fresh.rename(final)
    for old in folder.iterdir():
        if old != final:
            shutil.rmtree(old, ignore_errors=True)


def latest_state(folder: Path, fingerprint: str) -> tuple[int, Path] | None:
    """Newest checkpoint of a run with this fingerprint: its step and folder."""
    found = []
    for path in folder.glob(f"step_*/{STATE_FILE}"):
        state: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if state["fingerprint"] == fingerprint:
            found.append((int(state["step"]), path.parent))
    return max(found, default=None)


def restore_state(
    folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, rows: RowTable
) -> None:
    """Put a checkpoint's content in place.

    Raises:
        StageError: it is of another model.
    """
    try:
        weights = load_file(folder / "model.safetensors")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        rows.restore(load_file(folder / "rows.safetensors"))
        flat = load_file(folder / "optimizer.safetensors")
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise StageError(
            f"{folder}: cannot go on from this checkpoint ({str(error).splitlines()[0][:160]}). Delete it and run again."
        ) from error
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in flat.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
