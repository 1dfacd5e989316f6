"""Stage ``export``: the weights of a run as a Hugging Face folder with its card. ``python -m tagpr.export``."""

import json
import logging
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig

from tagpr.checkpoints import export_model
from tagpr.configuration import main
from tagpr.errors import ConfigError, StageError
from tagpr.model_card import Run, measured, model_card, read_run
from tagpr.runs import check_model_folder, write_text_atomically

logger = logging.getLogger("tagpr.export")


def run(config: DictConfig) -> None:
    """Write ``export.to``, replaced as a whole; doing it again writes the same.

    Raises:
        ConfigError: no run is named, or the target would be the source.
        StageError: the run has no such weights yet.
        DataError: the folder is no run's.
    """
    settings = config.export
    if settings.run is None:
        raise ConfigError("export.run=null: whose weights? Name a run's folder, like outputs/guided_rl.")
    folder = Path(settings.run)
    if (folder / "config.json").is_file() and (folder.parent / "manifest.json").is_file():
        folder = folder.parent  # its model folder was named
    trained = read_run(folder)
    name = folder.resolve().name if settings.step is None else f"{folder.resolve().name}-step{settings.step}"
    target = Path(settings.to) if settings.to else Path(config.run.dir) / name
    if target.resolve() in (folder.resolve(), (folder / "model").resolve()):
        raise ConfigError(f"export.to={target}: is the run itself. Name another folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    step = _weights(folder, settings.step, target)
    # What was measured is what the run handed over, not what lies here: the card is part of this folder's hash.
    handed_over = folder / "model" if settings.step is None else target
    found = measured(handed_over, Path(settings.evaluation))
    write_text_atomically(
        target / "README.md", model_card(trained, step, found, _prompts(trained), settings.title or name)
    )
    logger.info(
        "%s: weights of step %d, %s", target, step,
        f"measured as {found.label} in {settings.evaluation}" if found else "not measured (see its README.md)",
    )  # fmt: skip


def _weights(folder: Path, step: int | None, target: Path) -> int:
    """Put the weights into ``target``; returns whose step they are."""
    if step is not None:
        shards = folder / "checkpoints" / f"global_step_{step}"
        if not (shards / "actor").is_dir():
            steps = sorted(
                int(path.parent.name.rpartition("_")[2])
                for path in (folder / "checkpoints").glob("global_step_*/actor")
            )
            raise StageError(
                f"export.step={step}: {folder} has no checkpoint of this step. "
                f"Use one of {', '.join(map(str, steps)) or 'none'}, or null for the run's own model."
            )
        export_model(shards / "actor", target)
        return step
    model, finished = folder / "model", folder / "finished.json"
    if not finished.is_file():
        raise StageError(f"{folder}: is not finished. Set export.step to a checkpoint's step, or finish it.")
    check_model_folder(str(model), "export.run", "guided_rl.sh")
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(model, temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.replace(target)
    return int(json.loads(finished.read_text(encoding="utf-8"))["step"])


def _prompts(trained: Run) -> int | None:
    path = trained.folder / "data" / "train.parquet"
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowException):
        return None


if __name__ == "__main__":
    main("export", run)
