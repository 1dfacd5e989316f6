"""What a run will cost: an estimate before anything is asked, and what the ledger says afterwards.

``python -m data_pipeline.cost key=value ...`` prints it for a configuration, for both tagging modes, sync and batch.

Prompts are rendered from a sample of the real instances; how many units the later stages have, and how long replies are,
is expected (``chains.expected``) until the ledger has replies of that kind to go by. Tokens are counted at four bytes each
(:func:`tagpr.chat.tokens.approximate_tokens`), those of a kind that the ledger knows as the endpoint reported them.
"""

import json
import logging
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import cast

from omegaconf import DictConfig

from data_pipeline import exploratory, judge
from data_pipeline.ledger import Ledger, Spent, spent
from data_pipeline.prompts import PromptTemplate
from data_pipeline.settings import ROLES, ChainSettings, ModelSettings, in_this_job, read_settings
from data_pipeline.store import Store
from data_pipeline.tagging import Mode, RestrictedTagging
from tagpr.benchmarks.prompt import QueryTooLongError, build_prompt
from tagpr.benchmarks.storage import examples_file, iterate_examples
from tagpr.chat.cost import FREE, Price
from tagpr.chat.structured import structured_request
from tagpr.chat.tokens import BYTES_PER_TOKEN, approximate_tokens
from tagpr.configuration import main
from tagpr.errors import StageError
from tagpr.tags import format_response

logger = logging.getLogger("data_pipeline.cost")

SAMPLE = 200
# Replies of a kind that the ledger must have before they count for more than what is expected.
ENOUGH = 50
# Caches of providers begin at this many tokens of common prefix.
CACHED_FROM = 1024
# A sentence of a chain, to be repeated up to the length that is expected.
_SENTENCE = "The user has rated two similar products before, and praised the sound of both of them. "


@dataclass(frozen=True)
class Stage:
    """One kind of units by one model. ``cacheable`` tokens of a prompt are common to units that follow one another."""

    name: str
    kind: str
    role: str
    model: str
    price: Price
    units: float
    prompt_tokens: float
    completion_tokens: float
    cacheable: float = 0.0
    measured: bool = False

    def dollars(self, *, batch: bool = False, cached: bool = False) -> float:
        """Price of all units."""
        return self.price.dollars(
            round(self.units * self.prompt_tokens),
            round(self.units * self.completion_tokens),
            round(self.units * self.cacheable) if cached else 0,
            batch=batch,
        )


@dataclass(frozen=True)
class Estimate:
    """Stages in order; ``tagging`` has the restricted tagging of each mode, ``chosen`` is the one that is configured."""

    stages: tuple[Stage, ...]
    tagging: Mapping[Mode, Stage]
    chosen: Mode
    batch_roles: frozenset[str]
    prompts: str

    def dollars(self, mode: Mode | None = None, *, batch: bool | None = None, cached: bool = False) -> float:
        """All stages; with a tagging mode, and sync or batch, other than configured where given."""
        stages = [*self.stages, self.tagging[mode or self.chosen]]
        return sum(
            stage.dollars(batch=stage.role in self.batch_roles if batch is None else batch, cached=cached)
            for stage in stages
        )

    def lines(self) -> list[str]:
        """The estimate as a table."""
        lines = [
            f"estimate, prompts from {self.prompts}, tokens at {BYTES_PER_TOKEN:.0f} bytes each unless measured (*):",
            f"{'stage':<26}{'model':<38}{'units':>9}{'prompt tok.':>13}{'reply tok.':>12}{'$ sync':>10}{'$ batch':>10}",
        ]
        for stage in [*self.stages, *self.tagging.values()]:
            name = stage.name + ("*" if stage.measured else "")
            lines.append(
                f"{name:<26}{stage.model:<38}{stage.units:>9,.0f}{stage.units * stage.prompt_tokens:>13,.0f}"
                f"{stage.units * stage.completion_tokens:>12,.0f}{stage.dollars():>10,.2f}{stage.dollars(batch=True):>10,.2f}"
            )
        for mode in self.tagging:
            lines.append(
                f"in all with tagging.mode={mode}: ${self.dollars(mode, batch=False):,.2f} sync, "
                f"${self.dollars(mode, batch=True):,.2f} batch; sync with every common prefix served by the provider's cache: "
                f"${self.dollars(mode, batch=False, cached=True):,.2f}"
            )
        lines.append(f"this run as configured (tagging.mode={self.chosen}): ${self.dollars():,.2f}")
        return lines


@dataclass(frozen=True)
class Measured:
    """What a ledger says: replies and tokens by kind, and how many units of a stage come of one of the stage before."""

    mean: Mapping[str, tuple[float, float]]
    judged_per_rollout: float | None
    asked_again: Mapping[str, float]
    extra_per_instance: float | None
    tagged_per_judged: float | None


def measure(path: Path, rollouts: int) -> Measured | None:
    """Read a ledger, which may be in use; None where there is none yet."""
    if not path.is_file():
        return None
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        totals: dict[str, list[int]] = {}
        for row in spent(database):
            total = totals.setdefault(row.kind, [0, 0, 0])
            for place, value in enumerate((row.replies, row.prompt_tokens, row.completion_tokens)):
                total[place] += value
        firsts = dict(
            database.execute(
                "SELECT kind, COUNT(*) FROM unit WHERE json_extract(parameters, '$.attempt') = 0 GROUP BY kind"
            ).fetchall()
        )
        instances, extra = database.execute(
            "SELECT SUM(json_extract(parameters, '$.rollout') = 0), SUM(json_extract(parameters, '$.rollout') >= ?) "
            "FROM unit WHERE kind = 'teacher'",
            (rollouts,),
        ).fetchone()
    except sqlite3.Error:
        return None
    finally:
        database.close()

    def ratio(above: float | None, below: float | None) -> float | None:
        return above / below if below and below >= ENOUGH and above is not None else None

    return Measured(
        mean={kind: (p / n, c / n) for kind, (n, p, c) in totals.items() if n >= ENOUGH},
        judged_per_rollout=ratio(firsts.get("judge"), (instances or 0) * rollouts),
        asked_again={kind: totals[kind][0] / first for kind, first in firsts.items() if first >= ENOUGH},
        extra_per_instance=ratio(extra, instances),
        tagged_per_judged=ratio(firsts.get("tagger"), firsts.get("judge")),
    )


def estimate(
    settings: ChainSettings,
    prompts: Iterable[tuple[str, str | None]] | None,
    instances: int,
    blanks: int,
    measured: Measured | None = None,
) -> Estimate:
    """What a run over so many ``instances`` costs, ``blanks`` of them answered without the profile as well.

    ``prompts`` are (prompt, prompt without the profile or None) of instances, of which the first SAMPLE count; None: there are
    no examples yet, and prompts have ``chains.expected.prompt_tokens``.

    Raises:
        ConfigError: a prompt file cannot be used.
    """
    expected, preferences = settings.expected, settings.preferences
    known = measured or Measured({}, None, {}, None, None)
    sample = list(islice(prompts, SAMPLE)) if prompts is not None else []
    source = f"{len(sample)} real instances"
    if not sample:
        words = _stretch(expected.prompt_tokens)
        sample = [(words, words[: len(words) // 4])]
        source = f"no examples yet (chains.expected.prompt_tokens={expected.prompt_tokens})"
    texts = [prompt for prompt, _ in sample]
    without = [blank for _, blank in sample if blank is not None] or texts
    chain = _stretch(expected.chain_tokens, expected.segments)
    response = format_response(chain, "x" * int(expected.answer_tokens * BYTES_PER_TOKEN))
    judge_template = PromptTemplate.load("chains.prompts.judge", settings.prompts.judge, judge.PROMPT_FIELDS)

    judged = instances * settings.rollouts * (known.judged_per_rollout or expected.accurate)
    extra = (
        known.extra_per_instance
        if known.extra_per_instance is not None
        else expected.unsolved * preferences.extra_rollouts
    )
    if not preferences.pqp_pairs:
        extra = 0.0
    kept = judged * expected.judged
    tagged = kept + pair_units(settings, instances, blanks, kept, extra)
    if known.tagged_per_judged is not None:
        # A ledger whose run was stopped has only some of them: the larger number counts.
        tagged = max(tagged, judged * known.tagged_per_judged)
    reply_tokens = expected.chain_tokens + expected.answer_tokens

    def stage(
        name: str,
        kind: str,
        role: str,
        units: float,
        prompt: float,
        reply: float,
        fixed: float = 0.0,
        per: float = 1.0,
    ) -> Stage:
        model: ModelSettings = getattr(settings, role)
        price = FREE if in_this_job(settings, role) else settings.prices.get(model.model, FREE)
        mean = known.mean.get(kind)
        # All but the first unit of an instance find what comes before the chain in the cache.
        cacheable = fixed * max(0.0, 1.0 - 1.0 / per) if fixed >= CACHED_FROM and per > 0 else 0.0
        made = Stage(name, kind, role, model.model, price, units, prompt, reply, cacheable)
        return (
            replace(made, prompt_tokens=mean[0], completion_tokens=mean[1], measured=True) if mean else made
        )

    def again(kind: str, otherwise: float) -> float:
        return known.asked_again.get(kind, 1.0 + otherwise)

    question = _mean(texts)
    stages = [
        stage("teacher", "teacher", "teacher", instances * (settings.rollouts + extra), question, reply_tokens,
              question, settings.rollouts + extra),
        stage("teacher without profile", "teacher_without_profile", "teacher",
              blanks * preferences.prp_rollouts, _mean(without), reply_tokens),
    ]  # fmt: skip
    if instances:
        rendered = [judge_template.render(question=text, response=response) for text in texts]
        fixed = _mean(texts) + approximate_tokens(judge_template.text)
        schema = _schema(
            settings, structured_request(settings.judge.structured, judge.JudgeReply, judge.REPLY_NAME)
        )
        stages.append(
            stage("judge", "judge", "judge", judged * again("judge", expected.malformed), _mean(rendered) + schema,
                  expected.judge_reply_tokens, fixed, judged / instances)
        )  # fmt: skip
    wanted = settings.exploratory.chains
    free = min(kept, wanted * kept if wanted <= 1 else wanted)
    if free:
        explorer = exploratory.ExploratoryTagging.load(settings.prompts.exploratory_tagging)
        asked = [explorer.prompt(text, chain) for text in texts]
        stages.append(
            stage("exploratory tagging", "exploratory_tagger", "tagger",
                  free * again("exploratory_tagger", expected.malformed),
                  _mean(asked) + _schema(settings, explorer.request()), expected.exploratory_reply_tokens)
        )  # fmt: skip
    tagging: dict[Mode, Stage] = {}
    modes: tuple[Mode, ...] = ("paper", "span")
    for mode in modes:
        restricted = RestrictedTagging.load(
            mode, settings.prompts, settings.minimum_segments, settings.tagger.structured
        )
        asked = [restricted.prompt(text, chain) for text in texts]
        made = stage(
            f"tagging ({mode})", "tagger", "tagger", tagged * again("tagger", expected.malformed),
            _mean(asked) + _schema(settings, restricted.request()),
            approximate_tokens(restricted.typical_reply(chain, expected.segments)),
            _mean(asked) - expected.chain_tokens, tagged / max(1, instances),
        )  # fmt: skip
        if mode != settings.tagging.mode and made.measured:
            # The ledger's replies are of the other mode: only their number tells something.
            plain = known.mean["tagger"]
            made = replace(
                made, measured=False, prompt_tokens=plain[0],
                completion_tokens=approximate_tokens(restricted.typical_reply(chain, expected.segments)),
            )  # fmt: skip
        tagging[mode] = made
    roles = frozenset(
        role for role in ROLES if cast("ModelSettings", getattr(settings, role)).mode == "batch"
    )
    return Estimate(tuple(stages), tagging, settings.tagging.mode, roles, source)


def pair_units(settings: ChainSettings, instances: int, blanks: int, kept: float, extra: float) -> float:
    """Chains that are tagged for pairs only, if so many are ``kept`` for SFT and there are ``extra`` rollouts an instance."""
    preferences = settings.preferences
    pairs = 2 * (preferences.prp_pairs + preferences.pqp_pairs) * settings.expected.untagged_in_pairs
    # There cannot be more pairs than chains for them.
    others = instances * (settings.rollouts + extra) + blanks * preferences.prp_rollouts - kept
    return min(pairs, others)


def tagging_reply_tokens(settings: ChainSettings) -> float:
    """Of a restricted tagger's reply, in the mode that is set."""
    tagging = RestrictedTagging.load(settings.tagging.mode, settings.prompts, settings.minimum_segments)
    expected = settings.expected
    chain = _stretch(expected.chain_tokens, expected.segments)
    return approximate_tokens(tagging.typical_reply(chain, expected.segments))


def _stretch(tokens: float, sentences: int = 1) -> str:
    """A text of this length, of so many sentences at least."""
    length = int(tokens * BYTES_PER_TOKEN)
    sentence = _SENTENCE
    if length < sentences * len(sentence):
        sentence = f"{_SENTENCE[: max(1, length // sentences - 2)]}. "
    return (sentence * (length // len(sentence) + 1))[:length]


def _mean(texts: Sequence[str]) -> float:
    return sum(map(approximate_tokens, texts)) / len(texts)


def _schema(settings: ChainSettings, request: Mapping[str, object]) -> float:
    """A schema is paid for like the prompt it comes with; the simulated endpoint counts prompts only."""
    if settings.endpoint == "simulated" or not request:
        return 0.0
    return approximate_tokens(json.dumps(request))


def spent_dollars(rows: Iterable[Spent], prices: Mapping[str, Price]) -> float:
    """What the replies of a ledger have cost."""
    return sum(
        prices.get(row.model, FREE).dollars(
            row.prompt_tokens, row.completion_tokens, row.cached_prompt_tokens, batch=row.batch
        )
        for row in rows
    )


def check_budget(made: Estimate, settings: ChainSettings, spent: float) -> None:
    """Stop a run that looks expensive before it asks anything, unless it was told to go on.

    Raises:
        StageError: what is still to be spent is above ``chains.budget.ask_above_dollars``, without ``chains.budget.yes``.
    """
    budget = settings.budget
    left = made.dollars() - spent
    if budget.dollars is not None and left + spent > budget.dollars:
        logger.warning(
            "the estimate of $%.2f is above chains.budget.dollars=%g: the run will stop before it is reached",
            made.dollars(), budget.dollars,
        )  # fmt: skip
    if budget.ask_above_dollars is not None and left > budget.ask_above_dollars and not budget.yes:
        raise StageError(
            f"chains.budget.ask_above_dollars={budget.ask_above_dollars:g}: this run is estimated at ${left:,.2f} more. "
            "Set chains.budget.yes=true (recipes: --yes) to go on, and chains.budget.dollars for a hard limit."
        )


def before_run(settings: ChainSettings, store: Store, ledger: Ledger) -> None:
    """Log the estimate for the instances in the store, and ask before a lot is spent.

    Raises:
        StageError: as :func:`check_budget`.
    """
    count = store.instance_count()
    step = max(1, count // SAMPLE)
    blanks, sample = 0, []
    for place, instance in enumerate(store.instances()):
        blanks += instance.blank_prompt is not None
        if place % step == 0:
            sample.append((instance.prompt, instance.blank_prompt))
    made = estimate(settings, sample, count, blanks, measure(ledger.path, settings.rollouts))
    for line in made.lines():
        logger.info("%s", line)
    check_budget(made, settings, spent_dollars(ledger.spent(), settings.prices))


def compare(made: Estimate, rows: Iterable[Spent]) -> list[str]:
    """Estimated against paid tokens, by kind and in all; a line each."""
    paid: dict[str, list[int]] = {}
    for row in rows:
        total = paid.setdefault(row.kind, [0, 0, 0])
        for place, value in enumerate((row.replies, row.prompt_tokens, row.completion_tokens)):
            total[place] += value
    lines = [f"{'estimate / ledger':<26}{'units':>8}{'prompt':>8}{'reply':>8}"]
    sums = [[0.0, 0.0], [0.0, 0.0]]
    for stage in [*made.stages, made.tagging[made.chosen]]:
        units, prompt, reply = paid.get(stage.kind, [0, 0, 0])
        own = stage.units * stage.prompt_tokens, stage.units * stage.completion_tokens
        for place, (estimated, real) in enumerate(zip(own, (prompt, reply), strict=True)):
            sums[place][0] += estimated
            sums[place][1] += real
        if units:
            lines.append(
                f"{stage.name:<26}{stage.units / units:>8.3f}{own[0] / prompt:>8.3f}{own[1] / reply:>8.3f}"
            )
    if all(real for _, real in sums):
        lines.append(f"{'in all':<26}{'':>8}{sums[0][0] / sums[0][1]:>8.3f}{sums[1][0] / sums[1][1]:>8.3f}")
    return lines


def show(config: DictConfig) -> None:
    """Print the estimate for a configuration, and how it compares where the ledger has something.

    Raises:
        ConfigError: a setting or a prompt file cannot be used.
        DataError: the examples are malformed.
    """
    settings = read_settings(config)
    tasks = list(config.benchmark.tasks)
    source = examples_file(config.paths.examples, "train")
    prompts: list[tuple[str, str | None]] = []
    instances = settings.instances_per_task * len(tasks)
    if source.is_file():
        left = dict.fromkeys(tasks, SAMPLE // len(tasks))
        for example in iterate_examples(source):
            if left.get(example.task, 0) > 0:
                left[example.task] -= 1
                try:
                    both = [
                        build_prompt(
                            example, size, config.benchmark.retriever, None, config.benchmark.max_prompt_tokens,
                            seed=config.run.seed,
                        ).text
                        for size in (config.benchmark.profile_size, 0)
                    ]  # fmt: skip
                except QueryTooLongError:
                    continue
                prompts.append((both[0], both[1]))
    ledger = Path(settings.ledger)
    preferences = settings.preferences
    blanks = min(settings.instances_per_task, preferences.prp_instances_per_task) * len(tasks)
    before = estimate(settings, prompts or None, instances, blanks if preferences.prp_pairs else 0)
    known = measure(ledger, settings.rollouts)
    lines = before.lines()
    if known is not None and known.mean:
        made = estimate(settings, prompts or None, instances, blanks if preferences.prp_pairs else 0, known)
        with sqlite3.connect(f"file:{ledger}?mode=ro", uri=True) as database:
            rows = spent(database)
        lines += ["", f"with what {ledger} has measured:", *made.lines()]
        lines += ["", f"paid so far: ${spent_dollars(rows, settings.prices):,.2f}", *compare(before, rows)]
    for line in lines:
        logger.info("%s", line)


if __name__ == "__main__":
    main("build_chains", show)
