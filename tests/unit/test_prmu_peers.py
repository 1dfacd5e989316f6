"""Two processes that divide every batch (gloo) end with the weights of one."""

import multiprocessing
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from prmu_tiny import make_base
from safetensors.torch import load_file
from test_prmu_train import habit_pairs, write

from tagpr.configuration import compose, resolve
from tagpr.errors import RunFault, StageError
from tagpr.prmu import train as stage
from tagpr.prmu.peers import Peers, _fault


def process(rank: int, world: int, meeting: str, config: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    stage.work(OmegaConf.create(config))
    index, gradient = Peers().add_up_rows(
        torch.tensor([5, 2, 5][: rank + 2]), torch.ones(rank + 2, 3) * (rank + 1)
    )
    assert index.tolist() == [2, 5]
    assert gradient[:, 0].tolist() == [3.0, 1.0 + 2.0 * 2], (
        "a row of both processes, and one that is there twice"
    )
    dist.destroy_process_group()


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    write(tmp_path / "chains", habit_pairs(6, 8))
    base = make_base(tmp_path / "base")
    models = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        config = resolve(
            compose(
                "train_prmu",
                [f"run.outputs={tmp_path}", f"paths.base={base}", f"run.dir={folder}", f"paths.prmu={folder}/model",
                 "train_prmu.epochs=2", "train_prmu.batch_size=8", "train_prmu.learning_rate=1e-3"],
            )
        )  # fmt: skip
        if world == 1:
            stage.work(config)
        else:
            spawn = multiprocessing.get_context("spawn")
            started = [
                spawn.Process(
                    target=process, args=(rank, world, str(tmp_path / "meeting"), OmegaConf.to_yaml(config))
                )
                for rank in range(world)
            ]
            for each in started:
                each.start()
            for each in started:
                each.join(120)
            assert [each.exitcode for each in started] == [0, 0]
        models.append(load_file(folder / "model" / "model.safetensors"))
    for name, value in models[0].items():
        # Gradients are summed in another order; a dozen updates of Adam carry the last bits a little further.
        assert torch.allclose(value, models[1][name], atol=2e-4), (
            name,
            (value - models[1][name]).abs().max(),
        )


def test_a_group_that_dies_may_be_started_again_and_our_own_errors_may_not() -> None:
    died = _fault(RuntimeError("The actor is dead.\nIts process was killed."))
    assert isinstance(died, RunFault)
    assert str(died) == "train_prmu: a worker failed (Its process was killed.). See Ray's logs."
    wrapped = RuntimeError("worker 0 failed")
    wrapped.__cause__ = StageError("train_prmu: loss is not finite. Lower the rate.")
    told = RuntimeError("Traceback\ntagpr.errors.StageError: train_prmu: loss is not finite. Lower the rate.")
    for error in (wrapped, told):
        ours = _fault(error)
        assert not isinstance(ours, RunFault)
        assert str(ours) == "train_prmu: loss is not finite. Lower the rate."
