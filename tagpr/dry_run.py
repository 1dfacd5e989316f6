"""``--dry-run``: what a stage would do, before a GPU is asked for. No torch, no Ray; starts nothing, writes nothing."""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import tagpr.config
from tagpr.checkpoints import latest_complete
from tagpr.configuration import compose, export, flat, resolve
from tagpr.errors import ConfigError
from tagpr.model_shapes import Shape, read_shape
from tagpr.rewards.weights import asks_prmu
from tagpr.rl.checks import check, check_context, schedule
from tagpr.rl.hardware import chosen, local_gpus
from tagpr.runs import complete_lines

GIB = 2**30
USUAL_GPU_GIB = 80
# Of a GPU's memory, what CUDA, NCCL and fragmentation take before anybody else.
OVERHEAD_GIB = 4.0
# Bytes for each logit of a micro-batch in the update: itself and its gradient in bf16, its softmax in fp32.
LOGIT_BYTES = 8
RL_STAGES = ("guided_rl", "exploratory_rl")


@dataclass
class Section:
    """A heading and what stands below it."""

    title: str
    lines: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, text: str) -> None:
        """One more line."""
        self.lines.append((name, text))

    def __str__(self) -> str:
        width = min(28, max((len(name) for name, _ in self.lines), default=0))
        return "\n".join([self.title, *(f"  {name:<{width}}  {text}" for name, text in self.lines)])


def dry_run(stage: str, overrides: Sequence[str], first: Sequence[str] = ()) -> str:
    """The text of ``--dry-run``; ``first`` are the stages whose products are missing and would be made before.

    Raises:
        ConfigError: what the stage itself would refuse: an unknown key, batches that do not divide, a context too short.
    """
    gpus = local_gpus()
    if stage in RL_STAGES:
        overrides = [*chosen(overrides, len(gpus)), *overrides]
    elif stage == "sft" and gpus and not any(each.startswith("sft_hardware=") for each in overrides):
        overrides = ["sft_hardware=gpu", *overrides]
    config = resolve(compose(stage, overrides))
    export(config)
    sections = [_configuration(stage, overrides, config)]
    if stage in RL_STAGES:
        sections += _rl(config, gpus)
    elif stage == "sft":
        sections += _sft(config)
    elif stage == "train_prmu":
        sections += _prmu(config)
    elif stage == "evaluate":
        sections += _evaluation(config)
    sections.append(_files(stage, config, first))
    return "\n\n".join(str(section) for section in sections)


# configuration


def _configuration(stage: str, overrides: Sequence[str], config: DictConfig) -> Section:
    folder = Path(tagpr.config.__file__).parent
    groups = [each for each in overrides if (folder / each.lstrip("+~").partition("=")[0]).is_dir()]
    section = Section(f"{stage} --dry-run: nothing is started, nothing is written")
    section.add("chosen", " ".join(groups) or "the defaults")
    after = dict(flat(OmegaConf.to_container(config)))
    alone = len(groups) == len(overrides)
    before = after if alone else dict(flat(OmegaConf.to_container(resolve(compose(stage, groups)))))
    changed = [key for key in after if key not in before or before[key] != after[key]]
    changed += [key for key in before if key not in after]
    section.add(
        "keys",
        f"{len(after)}; `--cfg` prints them all; {len(changed)} differ from the defaults of what was chosen",
    )
    for key in changed:
        old = json.dumps(before[key], ensure_ascii=False, default=str) if key in before else "(no such key)"
        new = json.dumps(after[key], ensure_ascii=False, default=str) if key in after else "(taken out)"
        section.add(f"  {key}", f"{old} -> {new}")
    return section


# RL


def _rl(config: DictConfig, gpus: Sequence[float]) -> list[Section]:
    check(config)
    actor, rollout, data, trainer = (
        config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.data, config.trainer,
    )  # fmt: skip
    check_context(config)
    world = trainer.nnodes * trainer.n_gpus_per_node
    shards = world // actor.ulysses_sequence_parallel_size
    responses = data.train_batch_size * rollout.n
    mini = actor.ppo_mini_batch_size * rollout.n
    longest = data.max_prompt_length + data.max_response_length
    unit = "GPU" if trainer.device != "cpu" else "process"

    batch = Section("workers and batches")
    batch.add("workers", f"{world} = {trainer.nnodes} nodes x {trainer.n_gpus_per_node}, on {trainer.device}")
    if (
        trainer.nnodes == 1
        and gpus
        and trainer.device == "cuda"
        and len(gpus) < world
        and config.launch.address is None
    ):
        batch.add("  WARNING", f"this machine has {len(gpus)} GPUs")
    engines = world // rollout.tensor_model_parallel_size
    batch.add("rollout engines", f"{engines}, tensor parallel over {rollout.tensor_model_parallel_size}")
    batch.add(
        "rollouts per step",
        f"{responses} = {data.train_batch_size} prompts x {rollout.n}, {responses / engines:g} an engine",
    )
    batch.add(
        "updates per step",
        f"{data.train_batch_size // actor.ppo_mini_batch_size} of {mini} responses, {mini // shards} a {unit}",
    )
    if actor.use_dynamic_bsz:
        budget = actor.ppo_max_token_len_per_gpu * actor.ulysses_sequence_parallel_size
        per_shard = mini // shards
        least, most = max(1, min(per_shard, budget // longest)), math.ceil(per_shard * longest / budget)
        batch.add(
            f"micro-batches per {unit}",
            f"by tokens: at most {budget}, which is {least} of the longest responses; at most {most} an update",
        )
    else:
        batch.add(f"micro-batches per {unit}", f"{actor.ppo_micro_batch_size_per_gpu} responses")
    batch.add(
        "tokens per step",
        f"at most {data.train_batch_size * data.max_prompt_length + responses * data.max_response_length:,} to process while "
        f"rolling out, {responses * longest:,} in the update; longest {data.max_prompt_length} + {data.max_response_length}",
    )
    prompts, where = _prompts(config)
    if prompts is None:
        batch.add("steps", f"{trainer.total_training_steps or 'unknown'} ({where})")
        steps = trainer.total_training_steps or 0
    else:
        per_epoch, steps = schedule(config, prompts)
        batch.add("prompts", f"{prompts:,} ({where})")
        batch.add("steps", f"{steps} = {steps / per_epoch:g} epochs of {per_epoch}")
        left = prompts - per_epoch * data.train_batch_size
        if left:
            batch.add("  note", f"{left} prompts do not fill a batch and are left out of every epoch")
    found = latest_complete(Path(trainer.default_local_dir)) if trainer.resume_mode == "auto" else None
    if found is not None:
        batch.add("resumes", f"after step {found[0]} ({found[1]})")

    model = config.actor_rollout_ref.model.path
    shape, source = _shape(model, config.paths.base)
    return [batch, *_rl_memory(config, shape, source, gpus), _rl_disk(config, shape, steps)]


def _prompts(config: DictConfig) -> tuple[int | None, str]:
    """Training prompts, and how that is known."""
    benchmark = config.benchmark
    tasks, asked = list(benchmark.tasks), benchmark.rl_rows
    file = Path(config.paths.examples) / "train.parquet"
    if file.is_file():
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        counts = {
            entry["values"]: entry["counts"]
            for entry in pc.value_counts(pq.read_table(file, columns=["task"])["task"]).to_pylist()
        }
        drawn = {task: min(counts.get(task, 0), _asked(asked, task, counts.get(task, 0))) for task in tasks}
        return sum(drawn.values()), f"of {sum(counts.get(task, 0) for task in tasks):,} rows in {file}"
    if asked is not None and OmegaConf.is_dict(asked):
        return sum(
            asked.get(task) or 0 for task in tasks
        ), f"as benchmark.rl_rows asks; {file} is not there yet"
    return None, f"{file} is not there yet"


def _asked(rows: Any, task: str, there: int) -> int:
    if rows is None:
        return there
    wanted = rows.get(task) if OmegaConf.is_dict(rows) else rows
    return there if wanted is None else int(wanted)


def _shape(model: str, base: str) -> tuple[Shape | None, str]:
    shape = read_shape(model)
    if shape is not None:
        return shape, model
    return read_shape(base), f"{base}, from which {model} is made"


def _rl_memory(config: DictConfig, shape: Shape | None, source: str, gpus: Sequence[float]) -> list[Section]:
    section = Section("memory, roughly")
    if shape is None:
        section.add(
            "model", f"{config.actor_rollout_ref.model.path}: no config.json here, nothing can be said"
        )
        return [section]
    actor, rollout, model = (
        config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.actor_rollout_ref.model,
    )  # fmt: skip
    trainer, engine = config.trainer, actor.fsdp_config
    world = trainer.nnodes * trainer.n_gpus_per_node
    section.add("model", f"{shape.parameters:,} parameters ({source})")
    trained = shape.parameters
    if model.lora_rank:
        trained = shape.lora_parameters(model.lora_rank)
        section.add(
            "trained", f"{trained:,} of LoRA rank {model.lora_rank}, {100 * trained / shape.parameters:.2g} %"
        )
    master = 2 if engine.model_dtype in ("bf16", "bfloat16", "fp16") else 4
    weights, gradients = shape.parameters * master / world, trained * master / world
    moments = 2 * gradients
    served = 4 if rollout.dtype == "float32" else 2
    tokens = actor.ppo_max_token_len_per_gpu
    kept = 1 if model.enable_gradient_checkpointing else 16
    activations = tokens * shape.hidden * shape.layers * 2 * kept
    logits = tokens * shape.vocabulary * LOGIT_BYTES
    gathered = 2 * 2 * (shape.vocabulary * shape.hidden + shape.parameters // shape.layers)
    longest = config.data.max_prompt_length + config.data.max_response_length
    kv_token = shape.kv_values * served
    if trainer.device == "cpu":
        total = weights + gradients + moments + logits + activations
        section.add("training process", f"{_gib(total)} and 1 to 2 GiB of libraries")
        section.add(
            "attention cache",
            f"{kv_token * longest / 2**20:.2f} MiB for one longest response (VLLM_CPU_KVCACHE_SPACE)",
        )
        return [section]

    card = config.launch.gpu_memory_gib or (min(gpus) if gpus else USUAL_GPU_GIB)
    on_card = 0.0 if engine.param_offload else weights
    on_card += 0.0 if engine.optimizer_offload else moments
    asleep = 0.0 if rollout.free_cache_engine else rollout.gpu_memory_utilization * card * GIB
    update = weights + gradients + moments + activations + logits + gathered + asleep + OVERHEAD_GIB * GIB
    engine_weights = shape.parameters * served / rollout.tensor_model_parallel_size
    cache = rollout.gpu_memory_utilization * card * GIB - engine_weights - OVERHEAD_GIB * GIB
    rolling = rollout.gpu_memory_utilization * card * GIB + on_card
    section.add("one GPU", f"{card:g} GiB (launch.gpu_memory_gib)")
    section.add(
        "in the update",
        f"{_gib(update)}: weights {_gib(weights)}, gradients {_gib(gradients)}, optimizer {_gib(moments)}, activations "
        f"{_gib(activations)}, logits {_gib(logits)}, gathered layers {_gib(gathered)}, rest {OVERHEAD_GIB:g} GiB",
    )
    section.add(
        "in the rollout",
        f"{_gib(rolling)}: weights {_gib(engine_weights)}, attention cache {_gib(max(cache, 0))}",
    )
    held = cache * rollout.tensor_model_parallel_size / kv_token
    if cache > 0:
        section.add(
            "attention cache",
            f"{kv_token / 1024:.0f} KiB a token: {held:,.0f} tokens an engine, {held / longest:.0f} longest responses at once "
            f"(rollout.max_num_seqs={rollout.max_num_seqs})",
        )
    host = (weights if engine.param_offload else 0.0) + (moments if engine.optimizer_offload else 0.0)
    if host:
        section.add("host memory a node", f"{_gib(host * trainer.n_gpus_per_node)} of what is offloaded")
    if update > card * GIB:
        section.add(
            "  WARNING",
            "the update may not fit: lower actor_rollout_ref.actor.ppo_max_token_len_per_gpu, add GPUs, or use "
            "rl_hardware=gpu1_lora",
        )
    if cache <= kv_token * longest / rollout.tensor_model_parallel_size:
        section.add(
            "  WARNING",
            "no room for one response: raise actor_rollout_ref.rollout.gpu_memory_utilization or tensor_model_parallel_size",
        )
    if rolling > (card - OVERHEAD_GIB) * GIB:
        section.add(
            "  WARNING",
            "the rollout may not fit: lower gpu_memory_utilization, or offload parameters and optimizer",
        )
    return [section]


def _rl_disk(config: DictConfig, shape: Shape | None, steps: int) -> Section:
    trainer, actor = config.trainer, config.actor_rollout_ref.actor
    contents = actor.checkpoint.save_contents
    section = Section("disk")
    saves = math.ceil(steps / trainer.save_freq) if trainer.save_freq > 0 and steps else 0
    keep = trainer.max_actor_ckpt_to_keep
    # The newest is written before the oldest goes.
    most = saves if not keep else min(saves, keep + 1)
    section.add(
        "checkpoints",
        f"{saves} (every {trainer.save_freq} steps), {most} at once in {trainer.default_local_dir}",
    )
    if shape is None:
        return section
    rank = config.actor_rollout_ref.model.lora_rank
    master = 2 if actor.fsdp_config.model_dtype in ("bf16", "bfloat16", "fp16") else 4
    trained = shape.lora_parameters(rank) if rank else shape.parameters
    each = shape.parameters * master * ("model" in contents) + 2 * trained * master * (
        "optimizer" in contents
    )
    each += shape.parameters * 2 * ("hf_model" in contents)
    needed = each * most + shape.parameters * master
    _add_disk(section, each, needed, Path(trainer.default_local_dir))
    return section


def _add_disk(section: Section, each: float, needed: float, folder: Path) -> None:
    section.add("size", f"{_gib(each)} each, {_gib(needed)} in all with the model that is handed over")
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    section.add("free", f"{_gib(free)} at {there}")
    if free < needed:
        section.add(
            "  WARNING", "not enough: keep fewer checkpoints, save less often, or set run.outputs elsewhere"
        )


# the other stages


def _sft(config: DictConfig) -> list[Section]:
    trainer, data = config.trainer, config.data
    world = trainer.nnodes * trainer.n_gpus_per_node
    if data.train_batch_size % world:
        raise ConfigError(
            f"data.train_batch_size={data.train_batch_size}: does not divide over {world} GPUs. Use a multiple of {world}."
        )
    batch = Section("workers and batches")
    batch.add("workers", f"{world} = {trainer.nnodes} nodes x {trainer.n_gpus_per_node}, on {trainer.device}")
    batch.add("batch", f"{data.train_batch_size} chains, {data.train_batch_size // world} a worker")
    longest = data.max_length or config.benchmark.max_prompt_tokens + config.benchmark.max_response_tokens
    batch.add(
        "longest chain", f"{longest} tokens with its prompt; {data.max_token_len_per_gpu} at once a worker"
    )
    if data.max_token_len_per_gpu < longest:
        raise ConfigError(
            f"data.max_token_len_per_gpu={data.max_token_len_per_gpu}: less than the {longest} tokens of the longest chain. "
            "Raise it."
        )
    file, saves = Path(data.train_files), trainer.total_epochs
    if file.is_file():
        import pyarrow.parquet as pq

        rows = pq.read_metadata(file).num_rows
        steps = rows // data.train_batch_size
        if steps == 0:
            raise ConfigError(
                f"data.train_batch_size={data.train_batch_size}: larger than the {rows} chains of {file}. Lower it."
            )
        batch.add("chains", f"{rows:,}")
        batch.add("steps", f"{steps * trainer.total_epochs} = {trainer.total_epochs} epochs of {steps}")
    else:
        batch.add("steps", f"{trainer.total_epochs} epochs of a file that is not there yet ({file})")
    shape, source = _shape(config.model.path, config.paths.base)
    memory, disk = Section("memory, roughly"), Section("disk")
    keep = trainer.max_ckpt_to_keep
    most = saves if not keep else min(saves, keep + 1)
    disk.add("checkpoints", f"{saves} (one an epoch), {most} at once in {trainer.default_local_dir}")
    if shape is None:
        memory.add("model", f"{config.model.path}: no config.json here, nothing can be said")
        return [batch, memory, disk]
    state = shape.parameters * 16 / world
    logits = data.max_token_len_per_gpu * shape.vocabulary * LOGIT_BYTES
    memory.add("model", f"{shape.parameters:,} parameters ({source})")
    memory.add(
        "a worker",
        f"{_gib(state + logits)}: weights, gradients, optimizer {_gib(state)}, logits {_gib(logits)}",
    )
    _add_disk(
        disk, shape.parameters * 14, shape.parameters * (14 * most + 2), Path(trainer.default_local_dir)
    )
    return [batch, memory, disk]


def _prmu(config: DictConfig) -> list[Section]:
    settings = config.train_prmu
    if settings.batch_size % settings.workers:
        raise ConfigError(
            f"train_prmu.workers={settings.workers}: does not divide train_prmu.batch_size={settings.batch_size}. Use a divisor."
        )
    batch = Section("workers and batches")
    batch.add("workers", f"{settings.workers}")
    batch.add("batch", f"{settings.batch_size} pairs, {settings.micro_batch_size} a forward pass")
    files = [Path(config.paths.chains) / f"{name}.jsonl" for name in ("prp", "pqp")]
    if all(file.is_file() for file in files):
        pairs = sum(len(complete_lines(file)) for file in files)
        trained = int(pairs * (1 - settings.unseen_users) * (1 - settings.heldout_prompts))
        trained = min(trained, settings.max_training_pairs or trained)
        batch.add("pairs", f"{pairs:,}, about {trained:,} of them to train on")
        batch.add(
            "updates",
            f"about {settings.epochs * math.ceil(trained / settings.batch_size)} in {settings.epochs} epochs",
        )
    else:
        batch.add("pairs", f"not there yet ({files[0].parent})")
    shape = read_shape(settings.init)
    memory = Section("memory, roughly")
    if shape is None:
        memory.add("model", f"{settings.init}: no config.json here, nothing can be said")
    else:
        memory.add("model", f"{shape.parameters:,} parameters ({settings.init})")
        memory.add(
            "a worker", f"{_gib(shape.parameters * 16)} of weights, gradients and optimizer, and activations"
        )
    return [batch, memory]


def _evaluation(config: DictConfig) -> list[Section]:
    settings = config.evaluate
    labels = [label for label in settings.models if not settings.only or label in settings.only]
    passes = bool(settings.greedy) + len(settings.seeds)
    sizes, retrievers = len(settings.sweep.profile_sizes), len(settings.sweep.retrievers)
    conditions = 1 + (sizes * retrievers if settings.sweep.product else sizes + retrievers)
    section = Section("answers")
    section.add("models", ", ".join(labels))
    file = Path(config.paths.examples) / f"{settings.split}.parquet"
    if not file.is_file():
        section.add("rows", f"{file} is not there yet")
        return [section]
    import pyarrow.parquet as pq

    rows = min(pq.read_metadata(file).num_rows, settings.limit or math.inf)
    section.add("rows", f"at most {rows:,} of {file}")
    section.add(
        "answers",
        f"at most {len(labels) * (passes * rows + (conditions - 1) * rows):,.0f}: {passes} decodings, {conditions} conditions "
        "(those beside the first greedily)",
    )
    return [section]


# files


READ = {
    "base": ("paths.examples",),
    "build_chains": ("paths.examples",),
    "sft": ("model.path", "data.train_files"),
    "train_prmu": ("paths.chains", "train_prmu.init"),
    "serve_prmu": ("paths.prmu",),
    "guided_rl": ("paths.examples", "actor_rollout_ref.model.path", "paths.prmu"),
    "exploratory_rl": ("paths.examples", "actor_rollout_ref.model.path"),
    "evaluate": ("paths.examples",),
}


def _files(stage: str, config: DictConfig, first: Sequence[str]) -> Section:
    section = Section("reads and writes")
    for key in READ.get(stage, ()):
        value = str(OmegaConf.select(config, key))
        if stage == "guided_rl" and key == "paths.prmu" and not asks_prmu(config.objective):
            continue
        there = Path(value)
        state = (
            "there"
            if there.exists()
            else "a name on the hub"
            if key in ("model.path", "train_prmu.init")
            else "MISSING"
        )
        section.add("reads", f"{key}={value} ({state})")
    if stage == "evaluate":
        for label, model in config.evaluate.models.items():
            if isinstance(model, str) and (not config.evaluate.only or label in config.evaluate.only):
                section.add(
                    "reads",
                    f"evaluate.models.{label}={model} ({'there' if Path(model).exists() else 'MISSING'})",
                )
    if stage == "guided_rl" and asks_prmu(config.objective):
        section.add("asks", config.prmu_client.url or "a reward server of its own, on loopback")
    if first:
        section.add("makes first", ", ".join(first))
    folder = Path(config.run.dir).absolute()
    section.add("writes", f"{folder} ({'there: goes on, or is finished' if folder.exists() else 'new'})")
    if config.launch.submit is not None:
        section.add("runs", f"as a job of {config.launch.submit}")
    elif config.launch.address is not None:
        section.add("runs", f"here, with workers of the Ray at {config.launch.address}")
    return section


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
