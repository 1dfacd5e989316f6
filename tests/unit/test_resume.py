"""Checkpoints that are torn, cut, lost or of another run: each is named, none is a silent start from zero."""

import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from tagpr.checkpoints import damage, half_written, latest_complete, mark_complete, retain
from tagpr.errors import ConfigError, RunFault, StageError
from tagpr.rl.resume import check_unchanged, hold, resume
from tagpr.rl.saving import disk_full_is_named, no_space_is_named
from tagpr.rl.supervisor import ATTEMPT
from tagpr.runs import MetricsLog, append_line, last_step


def write(checkpoints: Path, step: int, world: int = 2, complete: bool = True) -> Path:
    """A checkpoint as verl's workers write it, in small."""
    folder = checkpoints / f"global_step_{step}"
    (folder / "actor" / "huggingface").mkdir(parents=True)
    for kind in ("model", "optim", "extra_state"):
        for rank in range(world):
            (folder / "actor" / f"{kind}_world_size_{world}_rank_{rank}.pt").write_text(
                f"{kind} {step} {rank}"
            )
    (folder / "data.pt").write_text("position")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(step))
    if complete:
        mark_complete(checkpoints, step)
    return folder


@pytest.fixture
def config(tmp_path: Path) -> DictConfig:
    return OmegaConf.create(
        {
            "run": {"dir": str(tmp_path), "seed": 0, "accept_changes": False},
            "launch": {"patience_s": 0.0},
            "objective": {"mode": "guided", "alpha": 0.8},
            "benchmark": {"tasks": ["lamp1"], "dir": "/data"},
            "data": {"train_batch_size": 8},
            "actor_rollout_ref": {"actor": {"optim": {"lr": 1e-6}}},
            "trainer": {
                "resume_mode": "auto", "resume_from_path": None, "default_local_dir": f"{tmp_path}/checkpoints", "nnodes": 2,
                "n_gpus_per_node": 1, "save_freq": 4, "val_before_train": True, "total_training_steps": 24,
            },
        }
    )  # fmt: skip


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return folder


def test_a_first_start_begins_at_zero(config: DictConfig, caplog: pytest.LogCaptureFixture) -> None:
    assert resume(config) == 0
    assert config.trainer.resume_mode == "disable"
    assert not caplog.messages


def test_it_goes_on_after_the_newest(config: DictConfig, checkpoints: Path) -> None:
    write(checkpoints, 4)
    newest = write(checkpoints, 16)
    assert resume(config) == 16
    assert (config.trainer.resume_mode, config.trainer.resume_from_path) == ("resume_path", str(newest))
    assert config.trainer.val_before_train is False


def test_a_half_written_one_is_removed_and_named(
    config: DictConfig, checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(checkpoints, 4)
    half = write(checkpoints, 8, complete=False)
    assert resume(config) == 4
    assert not half.exists()
    assert f"{half}: its saving was interrupted" in caplog.text
    # verl's own file says 8 already.
    assert "says '8'; the newest complete checkpoint is that of step 4" in caplog.text


@pytest.mark.parametrize("torn", ["", "1", "\x00\x00\x00", "sixteen"])
def test_verls_torn_tracker_decides_nothing(
    config: DictConfig, checkpoints: Path, caplog: pytest.LogCaptureFixture, torn: str
) -> None:
    write(checkpoints, 16)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(torn)
    assert resume(config) == 16
    assert "latest_checkpointed_iteration.txt: says" in caplog.text


@pytest.mark.parametrize("kind", ["cut", "gone", "marker", "no_actor"])
def test_a_damaged_one_is_named_and_the_one_before_it_taken(
    config: DictConfig, checkpoints: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    write(checkpoints, 4)
    folder = write(checkpoints, 8)
    shard = folder / "actor" / "optim_world_size_2_rank_1.pt"
    if kind == "cut":
        shard.write_text("opt")
    elif kind == "gone":
        shard.unlink()
    elif kind == "marker":
        (folder / "complete.json").write_text('{"step": 8, "fil')
    else:
        shutil.rmtree(folder / "actor")
    assert latest_complete(checkpoints) == (4, checkpoints / "global_step_4")
    assert resume(config) == 4
    expected = {"cut": "has 3 of", "gone": "is gone", "marker": "cannot be read", "no_actor": "is gone"}[kind]
    assert f"{folder}: is damaged" in caplog.text
    assert expected in caplog.text
    assert folder.exists(), "a damaged checkpoint is for a person to look at"


def test_without_any_good_one_it_does_not_start_from_zero(config: DictConfig, checkpoints: Path) -> None:
    (write(checkpoints, 8) / "data.pt").unlink()
    with pytest.raises(StageError, match=r"is damaged \(data.pt is gone\), and there is no other"):
        resume(config)


def test_checkpoints_that_vanished_are_missed(config: DictConfig, checkpoints: Path, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"step": step, "data": {}}) + "\n" for step in range(1, 6))
    (tmp_path / "metrics.jsonl").write_text(lines)
    with pytest.raises(StageError, match=r"no complete checkpoint, although .* tells of step 5"):
        resume(config)


def test_killed_before_the_first_checkpoint_it_says_so(
    config: DictConfig, checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "data": {}}\n')
    assert resume(config) == 0
    assert "no checkpoint was complete yet: steps 1 to 3 are done again" in caplog.text


def test_step_zero_is_no_checkpoint(config: DictConfig, checkpoints: Path) -> None:
    """Its validation is logged, nothing is saved."""
    (checkpoints / "global_step_0").mkdir()
    (checkpoints / "global_step_0" / "complete.json").write_text('{"step": 0}')
    assert resume(config) == 0


def test_another_number_of_gpus_is_refused_with_both(config: DictConfig, checkpoints: Path) -> None:
    write(checkpoints, 8, world=2)
    config.trainer.n_gpus_per_node = 4
    with pytest.raises(StageError, match=r"n_gpus_per_node=4: .* was written by 2 GPUs"):
        resume(config)


def test_a_shard_that_is_missing_after_saving_is_no_complete_checkpoint(checkpoints: Path) -> None:
    folder = write(checkpoints, 8, complete=False)
    (folder / "actor" / "model_world_size_2_rank_1.pt").unlink()
    with pytest.raises(StageError, match=r"model_world_size_2_rank_1\.pt is not there after saving"):
        mark_complete(checkpoints, 8)
    assert latest_complete(checkpoints) is None


def test_retention_keeps_the_newest_good_ones(checkpoints: Path) -> None:
    for step in (4, 8, 12, 16):
        write(checkpoints, step)
    (checkpoints / "global_step_16" / "data.pt").unlink()
    half = write(checkpoints, 20, complete=False)
    retain(checkpoints, 1)
    left = sorted(path.name for path in checkpoints.iterdir() if path.is_dir())
    assert left == ["global_step_12", "global_step_16", "global_step_20"]
    assert latest_complete(checkpoints) == (12, checkpoints / "global_step_12")
    assert half_written(checkpoints) == [half]
    retain(checkpoints, None)
    assert latest_complete(checkpoints) is not None


def test_a_good_one_has_no_damage(checkpoints: Path) -> None:
    assert damage(write(checkpoints, 4)) is None


def remember(config: DictConfig, folder: Path, train: str = "aaa") -> None:
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    (folder / "manifest.json").write_text(json.dumps({"inputs": {"train": train, "dev": "bbb"}}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("objective.alpha", 0.5),
        ("data.train_batch_size", 16),
        ("actor_rollout_ref.actor.optim.lr", 1e-5),
        ("benchmark.tasks", ["lamp2"]),
        ("run.seed", 1),
    ],
)
def test_what_decides_what_is_learned_may_not_change(
    config: DictConfig, tmp_path: Path, key: str, value: object
) -> None:
    remember(config, tmp_path)
    check_unchanged(config, {"train": "aaa"}, resumed=8)
    OmegaConf.update(config, key, value)
    with pytest.raises(ConfigError, match=rf"^{key}=.*: was .* up to step 8"):
        check_unchanged(config, {}, resumed=8)
    check_unchanged(config, {}, resumed=0)
    config.run.accept_changes = True
    check_unchanged(config, {}, resumed=8)


@pytest.mark.parametrize(
    ("key", "value"),
    [("trainer.total_training_steps", 50), ("trainer.save_freq", 2), ("benchmark.dir", "/moved"), ("launch.patience_s", 9.0)],
)  # fmt: skip
def test_what_may_change(config: DictConfig, tmp_path: Path, key: str, value: object) -> None:
    remember(config, tmp_path)
    OmegaConf.update(config, key, value)
    check_unchanged(config, {}, resumed=8)


def test_other_data_are_noticed_by_their_content(config: DictConfig, tmp_path: Path) -> None:
    remember(config, tmp_path)
    with pytest.raises(ConfigError, match=r"^train \(content\)=ccc: was aaa up to step 8"):
        check_unchanged(config, {"train": "ccc", "dev": "bbb"}, resumed=8)


def test_a_key_of_newer_sources_is_no_change(config: DictConfig, tmp_path: Path) -> None:
    remember(config, tmp_path)
    config.objective.new_key = 1
    check_unchanged(config, {}, resumed=8)


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json"])
@pytest.mark.parametrize(
    ("text", "wrong"), [(None, "is gone"), ("run: {dir: [", "cannot be read"), ("3", "cannot be read")]
)
def test_without_the_record_of_settings_and_data_it_does_not_go_on(
    config: DictConfig, tmp_path: Path, name: str, text: str | None, wrong: str
) -> None:
    remember(config, tmp_path)
    check_unchanged(config, {"train": "aaa"}, resumed=8)
    (tmp_path / name).unlink()
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(
        ConfigError, match=rf"{re.escape(name)}: {wrong}.*restore it, or set run.accept_changes=true"
    ):
        check_unchanged(config, {"train": "aaa"}, resumed=8)
    # A run that has no checkpoint yet has nothing to compare with; who accepts changes is not asked.
    check_unchanged(config, {"train": "aaa"}, resumed=0)
    config.run.accept_changes = True
    check_unchanged(config, {"train": "aaa"}, resumed=8)


def test_a_full_disk_is_one_line_and_leaves_the_good_one(checkpoints: Path) -> None:
    write(checkpoints, 4)

    def save() -> None:
        write(checkpoints, 8, complete=False)
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("a worker failed") from error

    with (
        pytest.raises(RunFault, match=r"no space for the checkpoint \(\d+ MiB free\)") as seen,
        disk_full_is_named(checkpoints),
    ):
        save()
    assert seen.value.status == 75
    assert [path.name for path in checkpoints.iterdir() if path.is_dir()] == ["global_step_4"]


def test_another_fault_while_saving_keeps_its_name(checkpoints: Path) -> None:
    with pytest.raises(KeyError, match="other"), disk_full_is_named(checkpoints):
        raise KeyError("other")


def test_torch_on_a_full_disk_is_understood(checkpoints: Path) -> None:
    """What torch.save raises where the kernel says ENOSPC."""
    torch = pytest.importorskip("torch")
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")

    def save() -> None:
        with Path("/dev/full").open("wb") as full:
            torch.save({"x": torch.zeros(100_000)}, full)

    with pytest.raises(RunFault), disk_full_is_named(checkpoints):
        save()


def test_a_full_disk_under_the_metrics_is_one_line_too(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    log = tmp_path / "log"
    log.symlink_to("/dev/full")
    with (
        pytest.raises(RunFault, match=r"no space on the disk \(\d+ MiB free\)") as seen,
        no_space_is_named(tmp_path),
    ):
        log.write_text("step 8")
    assert seen.value.status == 75
    with pytest.raises(FileNotFoundError), no_space_is_named(tmp_path):
        (tmp_path / "missing").read_text()


def test_metrics_that_were_torn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "data": {"a": 1}}\n{"step": 2, "da{"step": 2, "data": {"a": 2}}\n\x00\xff\xfe\n'
        b'{"step": 2, "data": {"a": 3}}\n{"step": 3, "data": {"a": 4}}\n{"step": 4, "da'
    )
    assert last_step(path) == 3
    log = MetricsLog(path, resumed_step=2)
    log.log({"a": 5}, 3)
    log.finish()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["data"]["a"]) for row in rows] == [(1, 1), (2, 3), (3, 5)]
    assert len((tmp_path / "metrics.jsonl.damaged").read_bytes().splitlines()) == 2
    assert "line 2 cannot be read" in caplog.text
    assert "line 3 cannot be read" in caplog.text


def test_lines_are_whole_behind_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "restarts.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    append_line(path, '{"a": 2}')
    append_line(path, '{"a": 3}\n')
    assert path.read_text().splitlines() == ['{"a": 1}', '{"a": ', '{"a": 2}', '{"a": 3}']


HOLD = """
import sys
sys.path[:0] = {path!r}
from omegaconf import OmegaConf
from tagpr.rl.resume import hold
hold(OmegaConf.create({{"run": {{"dir": {folder!r}}}, "launch": {{"patience_s": 0.0}}}}))
print("held", flush=True)
sys.stdin.read()
"""


def test_two_drivers_do_not_share_a_run(
    config: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = HOLD.format(path=sys.path, folder=str(tmp_path))
    other = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        monkeypatch.delenv(ATTEMPT, raising=False)
        with pytest.raises(
            StageError, match=rf"another process trains there \(process {other.pid} on "
        ) as seen:
            hold(config)
        assert seen.value.status == 2
        monkeypatch.setenv(ATTEMPT, "2")
        with pytest.raises(RunFault, match="another process"):
            hold(config)
    finally:
        other.kill()
        other.wait()
    hold(config)
