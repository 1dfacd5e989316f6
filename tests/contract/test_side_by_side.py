"""With a real Ray: what starts ahead on a CPU is what verl finds later."""

from pathlib import Path

import pytest
import torch

from tagpr.configuration import compose, resolve
from tagpr.local_ray import local_ray
from tagpr.rl import side_by_side

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a GPU: the CPU platform stands aside"
)


def test_queue_and_worker_start_while_something_else_happens(tmp_path: Path) -> None:
    config = resolve(compose("exploratory_rl"))
    environment = {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with local_ray(4, runtime_env={"env_vars": environment}):
        with side_by_side.prepared(config):
            began = True
        assert began
        import ray
        import transfer_queue as tq

        try:
            # As the trainer does: finds what is there.
            tq.init(config.transfer_queue)
            tq.kv_batch_put(
                keys=["a", "b"], partition_id="train", tags=[{"is_prompt": True}, {"is_prompt": False}]
            )
            assert set(tq.kv_list("train")["train"]) == {"a", "b"}
            worker = side_by_side.take_rollout_worker()
            assert side_by_side.take_rollout_worker() is None
            # It is up, and has not begun.
            with pytest.raises(ray.exceptions.RayTaskError, match="NoneType"):
                ray.get(worker.generate_sequences.remote(None), timeout=300)
        finally:
            tq.close()
