"""The processes that train together: each takes its share of a batch, and all have the same weights after every update."""

import os
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from tagpr.errors import ConfigError, RunFault, StageError, TagPRError
from tagpr.ray_jobs import connected, forwarded

# Gradients are added up in pieces of this size.
BUCKET_BYTES = 64 * 2**20
# For the processes to come up and import everything; Ray Train's own minute is short on a busy machine or a slow file system.
START_TIMEOUT_S = 300


class Peers:
    """This process among ``world``; alone where ``torch.distributed`` is not in use."""

    def __init__(self) -> None:
        self.together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.together else 0
        self.world = dist.get_world_size() if self.together else 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for the others."""
        if self.together:
            dist.barrier()

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        """Sum tensors over the processes, in place; the same tensors in the same order everywhere."""
        if not self.together:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([each.reshape(-1) for each in bucket])
            dist.all_reduce(flat)
            for each, part in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
                each.copy_(part.view_as(each))

    def add_up_rows(self, index: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the gradients [k, h] of rows ``index`` [k] over processes and repetitions; each row once, in order."""
        if self.together:
            counts = torch.zeros(self.world, dtype=torch.int64, device=index.device)
            counts[self.rank] = len(index)
            dist.all_reduce(counts)
            most = int(counts.max())
            padded = [each.new_zeros(most, *each.shape[1:]) for each in (index, gradient)]
            padded[0][: len(index)], padded[1][: len(index)] = index, gradient
            gathered = [[torch.empty_like(each) for _ in range(self.world)] for each in padded]
            for into, each in zip(gathered, padded, strict=True):
                dist.all_gather(into, each)
            sizes = counts.tolist()
            index, gradient = (
                torch.cat([each[:size] for each, size in zip(parts, sizes, strict=True)])
                for parts in gathered
            )
        found, place = index.unique(return_inverse=True)
        total = gradient.new_zeros(len(found), *gradient.shape[1:]).index_add_(0, place, gradient)
        return found, total

    def collect(self, values: Mapping[int, float], count: int) -> list[float]:
        """All ``count`` values, of which each process has those of some places."""
        parts: list[Mapping[int, float]] = [values]
        if self.together:
            parts = [{} for _ in range(self.world)]
            dist.all_gather_object(parts, dict(values))
        whole = {place: value for part in parts for place, value in part.items()}
        return [whole[place] for place in range(count)]

    def sums(self, *values: float) -> list[float]:
        """Each value summed over the processes."""
        if not self.together:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        total = total.to("cuda") if dist.get_backend() == "nccl" else total
        dist.all_reduce(total)
        return [float(each) for each in total.tolist()]


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def run_together(entry: str, config: DictConfig, gpus: bool) -> None:
    """Run the function ``entry`` ("module:name") on ``config``, in ``train_prmu.workers`` processes of Ray Train.

    With one worker: in this process, without Ray. A worker that dies takes its group down; Ray starts the group again, up to
    ``train_prmu.ray.most_failures`` times, and it goes on from its last checkpoint. So it does where the group does not come up
    within START_TIMEOUT_S (Ray's default is to try for ever). All nodes must see ``run.outputs`` at the same path.

    Raises:
        StageError: a worker found that something is wrong; says what.
        RunFault: the group died for good; says of what.
    """
    settings = config.train_prmu
    if settings.workers == 1:
        pkgutil.resolve_name(entry)(config)
        return
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_TIMEOUT_S))
    with _ray(settings):
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "entry": entry,
                "config": OmegaConf.to_container(config, resolve=True),
                "folder": os.getcwd(),
            },
            scaling_config=ScalingConfig(
                num_workers=settings.workers,
                use_gpu=gpus,
                resources_per_worker={"CPU": settings.threads} | ({"GPU": 1} if gpus else {}),
            ),
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            run_config=RunConfig(
                name="train_prmu",
                storage_path=str(Path(config.run.dir, "ray").absolute()),
                failure_config=FailureConfig(
                    max_failures=settings.ray.most_failures,
                    controller_failure_limit=settings.ray.most_failures,
                ),
            ),
        )
        try:
            trainer.fit()
        except ray.exceptions.RayError as error:
            raise _fault(error) from error
        except Exception as error:  # Ray Train wraps what a worker raised in errors of several kinds
            if type(error).__module__.startswith("ray."):
                raise _fault(error) from error
            raise


def _worker(given: Mapping[str, Any]) -> None:
    """What runs in each process of Ray Train."""
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    os.chdir(
        given["folder"]
    )  # Ray Train moves into a folder of its own; paths of the configuration are relative to ours
    pkgutil.resolve_name(given["entry"])(OmegaConf.create(given["config"]))


@contextmanager
def _ray(settings: DictConfig) -> Iterator[None]:
    from tagpr.local_ray import local_ray

    if settings.ray.address is not None:
        with connected(settings.ray.address, forwarded(), key="train_prmu.ray.address"):
            yield
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(local_ray(settings.workers * settings.threads + 1, quiet=False))
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"train_prmu.workers={settings.workers}: Ray does not start ({error}). Set 1."
            ) from error
        yield


def _fault(error: BaseException) -> StageError:
    """One line: our own error where a worker raised one, else a fault of the run, whose last line says something."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, TagPRError):
            return StageError(str(seen))
        seen = seen.__cause__ or seen.__context__
    for line in str(error).splitlines():
        name, _, text = line.strip().partition(": ")
        if name.startswith("tagpr.errors.") and text:
            return StageError(text)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return RunFault(
        f"train_prmu: a worker failed ({lines[-1][:300] if lines else type(error).__name__}). See Ray's logs."
    )
