"""Every configuration that the project ships composes, resolves, and is accepted by the pinned verl."""

import itertools
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

import tagpr.config
from tagpr.benchmarks.tasks import all_tasks
from tagpr.configuration import compose, resolve
from tagpr.errors import ConfigError
from tagpr.rl.checks import check, schedule

FOLDER = Path(tagpr.config.__file__).parent
# Stage files are those that choose a setting; the other files at the top are parts of them.
STAGES = sorted(
    path.stem
    for path in FOLDER.glob("*.yaml")
    if "- setting:" in path.read_text()
    or "- train_prmu\n" in path.read_text()  # or build on a stage that does
)
SETTINGS = sorted(path.stem for path in (FOLDER / "setting").glob("*.yaml"))
RL_STAGES = ("guided_rl", "exploratory_rl")


def groups(stage: str) -> list[str]:
    """Configuration groups that this stage's defaults list names."""
    defaults = OmegaConf.load(FOLDER / f"{stage}.yaml").defaults
    entries = [entry for entry in defaults if isinstance(entry, DictConfig)]
    return [next(iter(OmegaConf.to_container(entry, resolve=False))) for entry in entries]


def hardware(stage: str) -> list[list[str]]:
    options = [
        [f"{group}={path.stem}" for path in sorted((FOLDER / group).glob("*.yaml"))]
        for group in groups(stage)
        if group.endswith("_hardware")
    ]
    return [list(choice) for choice in itertools.product(*options)]


CASES = [(stage, [f"setting={s}", *h]) for stage in STAGES for s in SETTINGS for h in hardware(stage)]


@pytest.mark.parametrize(("stage", "overrides"), CASES)
def test_composes_and_resolves(stage: str, overrides: list[str]) -> None:
    config = resolve(compose(stage, overrides))
    assert config.run.dir.endswith(config.run.name)
    assert config.setting == overrides[0].removeprefix("setting=")


BENCHMARKS = sorted(path.stem for path in (FOLDER / "benchmark").glob("*.yaml"))


@pytest.mark.parametrize("stage", [stage for stage in STAGES if "benchmark" in groups(stage)])
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_stage_takes_every_benchmark(stage: str, benchmark: str) -> None:
    config = resolve(compose(stage, ["setting=paper", f"benchmark={benchmark}"]))
    # Whatever a stage asks of one benchmark, the others have too.
    assert set(OmegaConf.load(FOLDER / "benchmark" / "minilamp.yaml")) <= set(config.benchmark)
    assert config.benchmark.name == ("lamp" if benchmark == "paper" else benchmark)
    assert config.paths.examples.endswith(config.benchmark.name)
    if benchmark != "own":
        assert set(config.benchmark.tasks) <= set(all_tasks())


def test_own_tasks_are_all_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "tasks.yaml").write_text(
        "a_task:\n  title: A\n  kind: generation\n  fields: [x]\n  long_field: x\n"
        "  item: '{x}'\n  prompt: '{items} {query}'\n"
    )
    own = ["benchmark=own", f"benchmark.dir={tmp_path}"]
    assert list(resolve(compose("evaluate", own)).benchmark.tasks) == ["a_task"]
    assert list(resolve(compose("evaluate", [*own, "benchmark.tasks=[b]"])).benchmark.tasks) == ["b"]


def test_no_configuration_file_is_left_out() -> None:
    used = {FOLDER / f"{stage}.yaml" for stage in STAGES}
    for stage in STAGES:
        for group in groups(stage):
            used |= set((FOLDER / group).glob("*.yaml"))
        for entry in OmegaConf.load(FOLDER / f"{stage}.yaml").defaults:
            if isinstance(entry, str) and entry != "_self_":
                used.add(FOLDER / f"{entry}.yaml")
    assert set(FOLDER.rglob("*.yaml")) - used == set()


@pytest.mark.parametrize("stage", RL_STAGES)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_verl_takes_the_rl_configurations(stage: str, setting: str, device: str) -> None:
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    config = resolve(compose(stage, [f"setting={setting}", f"rl_hardware={device}"]))
    check(config)
    validate_config(config, use_reference_policy=False, use_critic=False)
    rollout = omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert (rollout.n, rollout.temperature, rollout.top_p) == (5, 1.0, 1.0)
    assert (actor.clip_ratio_low, actor.clip_ratio_high) == (3e-4, 4e-4)
    assert actor.policy_loss.loss_mode == "gspo"
    assert not actor.use_kl_loss


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_verl_takes_the_sft_configurations(setting: str, device: str) -> None:
    from verl.utils.config import omega_conf_to_dataclass

    config = resolve(compose("sft", [f"setting={setting}", f"sft_hardware={device}"]))
    for node in (config.engine, config.optim, config.checkpoint):
        omega_conf_to_dataclass(node)


def test_the_papers_sft_setting() -> None:
    config = resolve(compose("sft", ["setting=paper", "sft_hardware=gpu"]))
    assert (config.optim.lr, config.data.train_batch_size, config.trainer.total_epochs) == (1e-5, 64, 2)
    assert config.trainer.n_gpus_per_node == 8
    assert config.model.path == "Qwen/Qwen3-8B"


@pytest.mark.parametrize(("stage", "epochs", "steps"), [("guided_rl", 13, 845), ("exploratory_rl", 2, 130)])
def test_the_papers_rl_setting_takes_65_steps_an_epoch(stage: str, epochs: int, steps: int) -> None:
    config = resolve(compose(stage, ["setting=paper", "rl_hardware=gpu"]))
    prompts = sum(config.benchmark.rl_rows.values())
    assert prompts == 8320
    assert schedule(config, prompts) == (65, steps)
    assert config.trainer.total_epochs == epochs
    assert config.actor_rollout_ref.actor.optim.lr == 1e-6
    # Four updates a batch, so that the clip acts.
    assert config.data.train_batch_size / config.actor_rollout_ref.actor.ppo_mini_batch_size == 4
    objective = config.objective
    assert (objective.alpha, objective.beta, objective.gamma) == (0.8, 0.8, 0.2)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["no.such.key=1"], "no.such.key: no such key"),
        (["custom_reward_function.path=x.py"], "accepts this key and ignores it"),
        (["reward_model.enable=true"], "accepts this key and ignores it"),
        (["+sandbox_fusion.url=x"], "accepts this key and ignores it"),
        (["setting=papr"], "setting"),
        (["trainer.n_gpus_per_node"], "trainer.n_gpus_per_node"),
    ],
)
def test_refused_while_composing(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        compose("guided_rl", overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "actor_rollout_ref.actor.clip_ratio_high=0.2",
        "actor_rollout_ref.actor.clip_ratio_low=0.2",
        "actor_rollout_ref.actor.loss_agg_mode=token-mean",
        "algorithm.adv_estimator=gae",
        "actor_rollout_ref.rollout.n=1",
        "actor_rollout_ref.rollout.top_p=0.9",
        "actor_rollout_ref.actor.ppo_mini_batch_size=32",
        "actor_rollout_ref.actor.ppo_mini_batch_size=7",
        "trainer.use_v1=false",
        "trainer.v1.trainer_mode=separate_async",
        "actor_rollout_ref.actor.use_prefix_grouper=true",
        "reward.reward_manager.name=naive",
        "objective.mode=gided",
        "objective.alpha=-1",
    ],
)
def test_refused_before_anything_starts(override: str) -> None:
    config = resolve(compose("guided_rl", [override]))
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert override.split("=")[0].split(".")[-1] in str(caught.value)
