"""The card of an exported model: what it was trained on, how, and what was measured; only what files of the runs say."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tagpr.configuration import compose, flat, resolve
from tagpr.errors import ConfigError, DataError
from tagpr.runs import complete_lines, folder_hash

TITLES = {
    "sft": "supervised fine-tuning on tagged chains",
    "guided_rl": "guided RL (GSPO, eq. 5)",
    "exploratory_rl": "exploratory RL (GSPO, eq. 11)",
}
# Where things lay, what a launcher filled in, and what a run says about the machine: none of it says what was trained.
NOT_TOLD = (
    "run.", "paths.", "launch.", "prmu_client.", "hydra.", "ray_kwargs.", "data.train_files", "data.val_files",
    "trainer.default_local_dir", "trainer.rollout_data_dir", "trainer.resume", "trainer.val_before_train", "trainer.logger",
    "actor_rollout_ref.model.path", "actor_rollout_ref.rollout.max_model_len", "model.path", "benchmark.dir",
    "evaluate.models.", "evaluate.report.", "supervisor.", "monitors.", "serve.",
)  # fmt: skip
SETTINGS = {
    "learning rate": ("actor_rollout_ref.actor.optim.lr", "optim.lr"),
    "prompts a step": ("data.train_batch_size",),
    "responses a prompt": ("actor_rollout_ref.rollout.n",),
    "prompts an update": ("actor_rollout_ref.actor.ppo_mini_batch_size",),
    "clip, low": ("actor_rollout_ref.actor.clip_ratio_low",),
    "clip, high": ("actor_rollout_ref.actor.clip_ratio_high",),
    "alpha, beta, gamma": ("objective.alpha", "objective.beta", "objective.gamma"),
    "weights by step": ("objective.changes",),
    "prompt tokens, at most": ("benchmark.max_prompt_tokens",),
    "response tokens, at most": ("benchmark.max_response_tokens",),
    "profile items shown": ("benchmark.profile_size",),
    "retriever": ("benchmark.retriever",),
    "device": ("trainer.device",),
    "nodes x GPUs or processes": ("trainer.nnodes", "trainer.n_gpus_per_node"),
}


@dataclass(frozen=True)
class Run:
    """A stage's folder: what it was asked, what it read, how far it came."""

    folder: Path
    config: DictConfig
    manifest: Mapping[str, Any]
    last_metrics: Mapping[str, float]

    @property
    def stage(self) -> str:
        """The stage's name; runs of a name of their own say it by what they were to do."""
        mode = OmegaConf.select(self.config, "objective.mode")
        return "sft" if mode is None else f"{mode}_rl"

    @property
    def start(self) -> str:
        """The model that it began with."""
        key = "model.path" if self.stage == "sft" else "actor_rollout_ref.model.path"
        return str(OmegaConf.select(self.config, key))


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        DataError: it is none, or a file in it is damaged.
    """
    try:
        config = OmegaConf.load(folder / "config.yaml")
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        lines = complete_lines(folder / "metrics.jsonl")
        last: dict[str, float] = {}
        for line in lines:
            entry = json.loads(line)
            last |= {**entry["data"], "step": entry["step"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: is no folder of a run ({type(error).__name__}: {error}). Name one like outputs/guided_rl."
        ) from error
    if not isinstance(config, DictConfig) or "inputs" not in manifest:
        raise DataError(f"{folder}: is no folder of a run. Name one like outputs/guided_rl.")
    return Run(folder, config, manifest, last)


def lineage(run: Run) -> list[Run]:
    """This run and those that its weights came from, as far as their folders are still there, the last first."""
    found, seen = [run], {run.folder.resolve()}
    while True:
        before = Path(found[-1].start).parent
        if before.resolve() in seen or not (before / "config.yaml").is_file():
            return found
        try:
            found.append(read_run(before))
        except DataError:
            return found
        seen.add(before.resolve())


def differences(stage: str, config: DictConfig) -> list[tuple[str, Any]]:
    """Keys whose values are not the defaults of the setting, benchmark and hardware that ``config`` was composed from.

    Keys that only one of the two has are left out: they come and go with versions.
    """
    chosen = [f"setting={config.setting}"]
    benchmark = OmegaConf.select(config, "benchmark.name")
    device = OmegaConf.select(config, "trainer.device")
    if stage.endswith("_rl") and device:
        chosen.append(f"rl_hardware={'cpu' if device == 'cpu' else 'gpu'}")
    if stage == "sft" and device:
        chosen.append(f"sft_hardware={'cpu' if device == 'cpu' else 'gpu'}")
    try:
        own = compose(stage, chosen)
        if OmegaConf.select(own, "benchmark.name") not in (benchmark, None):
            own = compose(stage, [*chosen, f"benchmark={benchmark}"])
        defaults = dict(flat(OmegaConf.to_container(resolve(own))))
    except ConfigError:  # a setting of the user's own
        return []
    given = dict(flat(OmegaConf.to_container(config)))
    return [
        (key, value)
        for key, value in given.items()
        if key in defaults and defaults[key] != value and not key.startswith(NOT_TOLD)
    ]


@dataclass(frozen=True)
class Measured:
    """What an evaluation says about exactly this model."""

    label: str
    summary: Mapping[str, Any]
    manifest: Mapping[str, Any]
    command: str


def measured(model: Path, evaluation: Path) -> Measured | None:
    """The evaluation of a model folder; None where there is none, or it measured other weights.

    Raises:
        DataError: a file of the evaluation is damaged.
    """
    files = [evaluation / name for name in ("summary.json", "manifest.json", "config.yaml")]
    if not all(path.is_file() for path in files):
        return None
    try:
        summary, manifest = (json.loads(path.read_text(encoding="utf-8")) for path in files[:2])
        config = OmegaConf.load(files[2])
        own = folder_hash(model)
        labels = [label for label, digest in manifest["inputs"].items() if digest == own]
        if not labels or not summary["decodings"] or labels[0] not in summary["decodings"][0]["models"]:
            return None
        assert isinstance(config, DictConfig)
        changed = [f"{key}={_shell(value)}" for key, value in differences("evaluate", config)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{evaluation}: is damaged ({type(error).__name__}: {error}). Evaluate again."
        ) from error
    setting = [] if config.setting == "minilamp" else [f"setting={config.setting}"]
    return Measured(labels[0], summary, manifest, " ".join(["bash recipes/evaluate.sh", *setting, *changed]))


def model_card(run: Run, step: int, found: Measured | None, prompts: int | None, name: str) -> str:
    """The README.md of an exported model, in the Hugging Face hub's form.

    Args:
        run: that trained it.
        step: whose weights they are.
        found: its evaluation, or None.
        prompts: training prompts, None where nobody knows any more.
        name: heading.
    """
    return "\n".join([*_header(run), "", *_body(run, step, found, prompts, name)]) + "\n"


def _header(run: Run) -> Iterator[str]:
    yield "---"
    yield "library_name: transformers"
    yield "pipeline_tag: text-generation"
    yield "tags: [personalization, reasoning, tagpr]"
    base = lineage(run)[-1].start
    if not Path(base).exists() and base.count("/") == 1:
        yield f"base_model: {base}"
    yield "---"


def _body(run: Run, step: int, found: Measured | None, prompts: int | None, name: str) -> Iterator[str]:
    config, benchmark = run.config, run.config.get("benchmark")
    yield f"# {name}"
    yield ""
    yield (
        f"A language model after {TITLES.get(run.stage, run.stage)}, {step} steps. It reasons about one user, from items of "
        "the user's profile in the prompt, in tagged steps between `<think>` and `</think>`, and then answers."
    )
    if run.manifest.get("notes", {}).get("synthetic"):
        yield ""
        yield (
            "**Trained on SYNTHETIC users** (MiniLaMP): it knows no real language and no real person, and no figure below says "
            "anything about a real benchmark."
        )
    yield ""
    yield "## Training"
    yield ""
    yield "From the last stage to the first, as far as their folders were there:"
    yield ""
    for each in lineage(run):
        weights = str(each.manifest["inputs"].get("model", ""))[:12] or "unknown"
        source = each.manifest.get("git_revision") or "unknown"
        yield (
            f"- **{TITLES.get(each.stage, each.stage)}** on {_data(each)}, from weights {weights}, seed "
            f"{each.manifest.get('seed')}, {str(each.manifest.get('created'))[:10]}, source {source}. Settings other than the "
            f"defaults of `setting={each.config.get('setting')}`: {_changed(each)}."
        )
    yield ""
    yield "| setting of the last stage | value |"
    yield "| --- | --- |"
    if prompts is not None:
        yield f"| training prompts | {prompts:,} |"
    for title, keys in SETTINGS.items():
        values = [next((v for v in [OmegaConf.select(config, key)] if v is not None), None) for key in keys]
        if title == "learning rate":
            values = [next((value for value in values if value is not None), None)]
        if all(value is not None and value != [] for value in values):
            yield f"| {title} | {', '.join(str(value) for value in values)} |"
    versions = run.manifest.get("versions", {})
    yield f"| versions | {', '.join(f'{name} {version}' for name, version in versions.items())} |"
    curve = {
        key: run.last_metrics[key]
        for key in ("reward/total/mean", "reward/verifiable/mean", "tags/valid_frac", "train/loss")
        if key in run.last_metrics
    }
    if curve and run.last_metrics.get("step") == step:
        yield ""
        told = ", ".join(f"{key} {value:.3f}" for key, value in curve.items())
        yield f"In training, last figures up to step {step} (sampled responses, training users): {told}."
    yield ""
    yield "## Measured"
    yield ""
    yield from _figures(found)
    yield ""
    yield "## Use"
    yield ""
    yield (
        "The prompt is the benchmark's own, with items of the profile (`tagpr.benchmarks.prompt.build_prompt`), as one user "
        "message of the chat template. `bash recipes/serve.sh serve.model=FOLDER` serves it with the OpenAI API: `user` picks "
        "the profile."
    )
    if benchmark is not None:
        yield ""
        yield f"Tasks: {', '.join(str(task) for task in benchmark.get('tasks', []))}."
    tags = run.manifest.get("notes", {}).get("tags", [])
    yield ""
    yield f"Tags: {', '.join(f'`{tag}`' for tag in tags)}."


def _changed(run: Run) -> str:
    changed = differences(run.stage, run.config)
    return ", ".join(f"`{key}={_shell(value)}`" for key, value in changed) or "none"


def _data(run: Run) -> str:
    benchmark = run.config.get("benchmark")
    if benchmark is None:
        return "data that its folder does not name"
    synthetic = " (SYNTHETIC)" if benchmark.get("synthetic") else ""
    return f"{benchmark.get('name')}{synthetic}"


def _figures(found: Measured | None) -> Iterator[str]:
    if found is None:
        yield "Not measured: there was no evaluation of exactly these weights when this card was written."
        return
    summary = found.summary
    model = summary["decodings"][0]["models"][found.label]
    synthetic = " SYNTHETIC users." if summary["synthetic"] else ""
    yield (
        f"`{found.command}`, {str(found.manifest.get('created'))[:10]}: {model['rows']} rows of {model['users']} users, split "
        f"`{summary['split']}` of {summary['benchmark']}, {summary['retriever']}, {summary['profile_size']} items, "
        f"{summary['decodings'][0]['name']} decoding; in brackets 95 % intervals over users.{synthetic}"
    )
    yield ""
    yield "| measure | value |"
    yield "| --- | --- |"
    intervals = model["intervals"]
    yield f"| mean task score (R_v) | {_interval(model['task_score'], intervals.get('task_score'))} |"
    if model["reward"] is not None:
        yield f"| guided reward (eq. 5) | {_interval(model['reward'], intervals.get('reward'))} |"
    if model["well_formed"] is not None:
        yield f"| well-formed (R_f = 1, R_tag = 0) | {_interval(model['well_formed'], intervals.get('well_formed'))} |"
    for task, metrics in model["metrics"].items():
        for metric, value in metrics.items():
            if metric not in ("rows", "unparsable"):
                yield f"| {task} {metric} | {_interval(value, intervals.get(f'{task}/{metric}'))} |"


def _interval(value: float, interval: Mapping[str, Any] | None) -> str:
    if interval is None or interval["low"] is None:
        return f"{value:.3f}"
    return f"{value:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _shell(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return json.dumps(list(value), separators=(",", ":"))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
