"""A run that is started again goes on in the same run of its trackers: one curve, not one for each start.

verl names a new run whenever it makes its loggers. The ids are kept in ``<run.dir>/trackers.json``.
"""

import json
import logging
import os
import secrets
import string
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tagpr.runs import write_json_atomically

logger = logging.getLogger(__name__)

FILE = "trackers.json"
# Trackers that take an id of ours from the environment, and what tells them that the run may be there already.
BY_ENVIRONMENT = {
    "wandb": ("WANDB_RUN_ID", "WANDB_RESUME"),
    "swanlab": ("SWANLAB_RUN_ID", "SWANLAB_RESUME"),
}
ALPHABET = string.ascii_lowercase + string.digits


def before_tracking(run_dir: Path, loggers: list[str]) -> None:
    """Before verl makes its loggers: put the ids of this run into the environment, new ones where it has none."""
    known = _known(run_dir)
    for name, (variable, resume) in BY_ENVIRONMENT.items():
        if name in loggers:
            # One that a person has set wins.
            known[name] = os.environ.get(variable) or known.get(name) or new_id()
            os.environ[variable] = known[name]
            os.environ.setdefault(resume, "allow")
    if "mlflow" in loggers and "mlflow" in known:
        os.environ.setdefault("MLFLOW_RUN_ID", known["mlflow"])
        # They are there; MLflow refuses other values, and some differ from start to start (ports, for one).
        from verl.utils import tracking

        tracking._compute_mlflow_params_from_objects = lambda config: {}
    if known:
        write_json_atomically(run_dir / FILE, known)


def after_tracking(run_dir: Path, made: Mapping[str, Any], resumed: int) -> None:
    """Once verl has made its loggers: keep the ids that trackers have chosen; take back the curves beyond step ``resumed``."""
    if "mlflow" in made:
        import mlflow

        active = mlflow.active_run()
        if active is not None:
            write_json_atomically(run_dir / FILE, {**_known(run_dir), "mlflow": active.info.run_id})
    if "tensorboard" in made:
        # Steps that are done again: TensorBoard drops what an earlier start has written of them.
        writer = made["tensorboard"].writer
        writer.purge_step = resumed + 1 if resumed else 0
        writer.close()
        made["tensorboard"].log = partial(log_at_once, writer)


def log_at_once(writer: Any, data: Mapping[str, Any], step: int) -> None:
    """The metrics of a step as one event of TensorBoard's.

    verl adds hundreds of them, one by one, to a queue that holds ten, and waits for the thread that empties it.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard.summary import scalar

    values = [value for name in data for value in scalar(name, data[name]).value]
    writer._get_file_writer().add_summary(Summary(value=values), step)


def flush(made: Mapping[str, Any]) -> None:
    """Before a checkpoint is declared complete: write down what a kill would take from the curves up to its step.

    TensorBoard keeps up to two minutes in memory; the others send theirs from a process of their own.
    """
    if "tensorboard" in made:
        made["tensorboard"].writer.flush()


def new_id() -> str:
    """As SwanLab wants it, which is the strictest: 21 small letters and digits."""
    return "".join(secrets.choice(ALPHABET) for _ in range(21))


def _known(run_dir: Path) -> dict[str, str]:
    try:
        return {str(k): str(v) for k, v in json.loads((run_dir / FILE).read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError) as error:
        logger.warning("%s: cannot be read (%s); trackers begin new runs", run_dir / FILE, error)
        return {}
