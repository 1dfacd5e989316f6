"""Which checkpoint a run can go on from, and the Hugging Face folder that a finished run hands over."""

import json
import re
import shutil
from pathlib import Path

from tagpr.errors import StageError
from tagpr.runs import write_json_atomically

MARKER = "complete.json"
# As verl names them: of a LoRA run, in the folder of shards and in what it merges.
LORA_META = "lora_train_meta.json"
ADAPTER = "lora_adapter"
SHARD = re.compile(r"(?P<kind>\w+)_world_size_(?P<world>\d+)_rank_(?P<rank>\d+)\.pt")


def _folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"global_step_{step}"


def mark_complete(checkpoints: Path, step: int) -> None:
    """Declare that the checkpoint of a step was written whole (verl's own tracker file is written in place).

    The marker holds the size of every file, so that one that is cut or lost later is noticed.

    Raises:
        StageError: a worker's shard is not there, as when each node writes to a disk of its own.
    """
    folder = _folder(checkpoints, step)
    missing = missing_shard(folder)
    if missing is not None:
        raise StageError(
            f"{folder}: {missing} is not there after saving. Put trainer.default_local_dir on storage that all nodes share, and "
            "look there for space."
        )
    sizes = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MARKER
    }
    write_json_atomically(folder / MARKER, {"step": step, "world_size": world_size(folder), "files": sizes})


def missing_shard(folder: Path) -> str | None:
    """Name of a shard that belongs to those in ``folder/actor`` and is not among them; None where all ranks have theirs."""
    found = [match for path in (folder / "actor").glob("*.pt") if (match := SHARD.fullmatch(path.name))]
    names = {match.string for match in found}
    for match in found:
        for rank in range(int(match["world"])):
            name = f"{match['kind']}_world_size_{match['world']}_rank_{rank}.pt"
            if name not in names:
                return f"actor/{name}"
    return None


def world_size(folder: Path) -> int | None:
    """Of the processes that wrote the checkpoint in ``folder``; None where it has no shards."""
    worlds = {
        int(match["world"])
        for path in (folder / "actor").glob("*.pt")
        if (match := SHARD.fullmatch(path.name))
    }
    return max(worlds, default=None)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint that was complete once, in a few words; None where nothing is."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        int(marker["step"])
        files = marker.get("files", {})
        for name, size in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is gone"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} of {size} bytes"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MARKER} cannot be read"
    return None if (folder / "actor").is_dir() else "actor is gone"


def _marked(checkpoints: Path) -> list[tuple[int, Path]]:
    """Folders with a marker, whatever is in it, newest first."""
    found = []
    for marker in checkpoints.glob(f"global_step_*/{MARKER}"):
        number = marker.parent.name.removeprefix("global_step_")
        if number.isdecimal() and int(number) > 0:
            found.append((int(number), marker.parent))
    return sorted(found, reverse=True)


def latest_complete(checkpoints: Path) -> tuple[int, Path] | None:
    """Newest checkpoint that was written whole and still is, as (step, folder); others are passed over."""
    return next((each for each in _marked(checkpoints) if damage(each[1]) is None), None)


def damaged(checkpoints: Path) -> list[tuple[int, Path, str]]:
    """Checkpoints that were complete and are no longer: (step, folder, what is wrong), newest first."""
    return [(step, path, wrong) for step, path in _marked(checkpoints) if (wrong := damage(path)) is not None]


def half_written(checkpoints: Path) -> list[Path]:
    """Folders of steps whose saving did not end."""
    return sorted(
        path for path in checkpoints.glob("global_step_*") if path.is_dir() and not (path / MARKER).exists()
    )


def retain(checkpoints: Path, keep: int | None) -> None:
    """Delete all but the ``keep`` newest good checkpoints (None or 0: none is deleted); the last good one always stays.

    A damaged one is no good one, so that it does not push a good one out; it is left for a person to look at.
    """
    if not keep or keep < 1:
        return
    good = [(step, path) for step, path in _marked(checkpoints) if damage(path) is None]
    for step, path in good[keep:]:
        # First of all it stops to be one, in case this is interrupted.
        going = path.with_name(f".deleted_step_{step}")
        shutil.rmtree(going, ignore_errors=True)
        path.replace(going)
        shutil.rmtree(going, ignore_errors=True)


def export_model(shards: Path, destination: Path) -> None:
    """Write a checkpoint's weights as a Hugging Face folder, atomically; those of a LoRA run with the adapter merged in.

    Weights that have to be put together from shards come out in bf16, whatever they were trained in.

    Args:
        shards: folder that verl's checkpoint manager wrote: ``huggingface/`` with the configuration, the tokenizer and perhaps
            whole weights, beside one file of sharded weights per rank.
        destination: replaced as a whole.

    Raises:
        StageError: the checkpoint holds no weights in a known form, or an adapter without its scale.
    """
    ready = shards / "huggingface"
    temporary = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    # Of a LoRA run, what verl calls whole weights has the adapter's tensors in it, under names that no model knows.
    adapted = (shards / LORA_META).is_file()
    if any(ready.glob("*.safetensors")) and not adapted:
        shutil.copytree(ready, temporary)
    elif any(shards.glob("model_world_size_*_rank_0.pt")):
        from verl.model_merger.base_model_merger import ModelMergerConfig
        from verl.model_merger.fsdp_model_merger import FSDPModelMerger

        merger = FSDPModelMerger(
            ModelMergerConfig(
                operation="merge",
                backend="fsdp",
                local_dir=str(shards),
                target_dir=str(temporary),
                hf_model_config_path=str(ready),
            )
        )
        merger.merge_and_save()
        merger.cleanup()
        if (temporary / ADAPTER).exists():
            _merge_adapter(temporary, shards)
    else:
        raise StageError(f"{shards}: holds no weights. Delete the folder and run the same command again.")
    shutil.rmtree(destination, ignore_errors=True)
    temporary.replace(destination)


def _merge_adapter(folder: Path, shards: Path) -> None:
    """Replace the frozen weights in ``folder`` and the adapter beside them by their sum, in float32 until it is written."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = folder / ADAPTER
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if not settings["lora_alpha"]:
        # verl writes 0 where it does not know: the weights from before training would pass for the trained ones.
        shutil.rmtree(folder)
        raise StageError(
            f"{shards / LORA_META}: does not tell the adapter's lora_alpha. Write it there as "
            '{"r": ..., "lora_alpha": ..., "task_type": "CAUSAL_LM"} and run the same command again.'
        )
    base = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    written_in = base.dtype
    merged = PeftModel.from_pretrained(base.to(torch.float32), str(adapter)).merge_and_unload(safe_merge=True)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    merged.to(written_in).save_pretrained(folder)
    shutil.rmtree(adapter)
