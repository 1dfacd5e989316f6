"""Which checkpoint a run can go on from, and the Hugging Face folder that a finished run hands over."""

import json
import shutil
from pathlib import Path

from tagpr.errors import StageError
from tagpr.runs import write_json_atomically

MARKER = "complete.json"


def _folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"global_step_{step}"


def mark_complete(checkpoints: Path, step: int) -> None:
    """Declare that the checkpoint of a step was written whole (verl's own tracker file is written in place)."""
    write_json_atomically(_folder(checkpoints, step) / MARKER, {"step": step})


def latest_complete(checkpoints: Path) -> tuple[int, Path] | None:
    """Newest checkpoint with a marker, as (step, folder); half-written ones are passed over."""
    found = []
    for marker in checkpoints.glob(f"global_step_*/{MARKER}"):
        step = json.loads(marker.read_text())["step"]
        if (marker.parent / "actor").is_dir():
            found.append((step, marker.parent))
    return max(found, default=None)


def export_model(shards: Path, destination: Path) -> None:
    """Write a checkpoint's weights as a Hugging Face folder, atomically.

    Args:
        shards: folder that verl's checkpoint manager wrote: ``huggingface/`` with the configuration, the tokenizer and perhaps
            whole weights, beside one file of sharded weights per rank.
        destination: replaced as a whole.

    Raises:
        StageError: the checkpoint holds no weights in a known form, or a LoRA adapter.
    """
    ready = shards / "huggingface"
    temporary = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    if any(ready.glob("*.safetensors")):
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
        if (temporary / "lora_adapter").exists():
            # Beside it lie the weights from before training: handed over, they would pass for the trained ones.
            shutil.rmtree(temporary)
            raise StageError(
                f"{shards}: holds a LoRA adapter, which is not merged here. Merge it with peft "
                "(PeftModel.from_pretrained, merge_and_unload) and point the next stage's paths.* at the result."
            )
    else:
        raise StageError(f"{shards}: holds no weights. Delete the folder and run the same command again.")
    shutil.rmtree(destination, ignore_errors=True)
    temporary.replace(destination)
