"""Memory and time of choosing preference pairs (S15, S16) as the chains grow; beside it, all pairs made at once.

    python tests/perf/pairs.py [--chains 9600,96000]

Made-up chains, sixteen to an instance and two without the profile, whose answers nearly all differ, so that nearly every two of
them are a pair: the worst case. Each measurement is a process of its own; ``peak_mb`` is what its peak memory grows by. The
reference makes every pair, shuffles them and takes turns; what it chooses must be the same. The last line is one JSON object.
"""

import argparse
import hashlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data_pipeline.preferences import Candidate, choose_pairs, pqp_candidates, prp_candidates
from data_pipeline.selection import interleave, shuffled
from data_pipeline.settings import PreferenceSettings, read_settings
from data_pipeline.store import Instance, Kind, Result, Store
from tagpr.configuration import compose, resolve
from tagpr.schema import Chain

ROLLOUTS, BLANKS = 16, 2
TASKS = ("lamp1", "lamp2", "lamp3", "lamp4", "lamp5", "lamp7")
WORDS = ("why", "how", "when", "the", "mayor", "opens", "shuts", "now", "again", "fair")


def fill(path: Path, chains: int) -> None:
    """A results store with so many chains."""
    rng = random.Random(0)
    instances = [
        Instance(number, f"e{number}", TASKS[number % 6], f"u{rng.randrange(chains // 20)}", "gold", "prompt " * 200, "blank")
        for number in range(chains // ROLLOUTS)
    ]  # fmt: skip
    with Store(path) as store:
        store.fill("made up", lambda: instances, lambda: {each.example_id for each in instances}, dict)
        kinds: tuple[tuple[Kind, int], ...] = (("main", ROLLOUTS), ("blank", BLANKS))
        for each in instances:
            store.add(
                [
                    Result(
                        Chain(
                            id=f"{each.example_id}-{kind}{rollout}", example_id=each.example_id, task=each.task,
                            user_id=each.user_id, prompt=each.prompt, gold=each.gold, rollout=rollout,
                            reasoning=f"{rng.random()} because " + "it is so and so. " * 60,
                            answer=" ".join(rng.choice(WORDS) for _ in range(6)), verifiable=round(rng.random(), 3),
                        ),
                        each.number, kind, kind == "main" and rollout % 3 == 0,
                    )
                    for kind, count in kinds
                    for rollout in range(count)
                ]
            )  # fmt: skip
        store.commit()


def all_at_once(store: Store, settings: PreferenceSettings) -> list[Candidate]:
    """Every pair there is, shuffled; then users, tasks and instances take turns."""
    instances = list(store.rollouts())
    prp = [
        pair
        for each in instances
        for pair in prp_candidates(each.kept, each.without_profile, settings.prp_minimum_gain)
    ]
    pqp = [pair for each in instances for pair in pqp_candidates(each.personalised, settings.pqp_margin)]
    return [
        pair
        for pairs, size in ((prp, settings.prp_pairs), (pqp, settings.pqp_pairs))
        for pair in interleave(
            shuffled(pairs, lambda pair: pair.id, 0),
            lambda pair: pair.chosen.user_id,
            lambda pair: pair.chosen.task,
            lambda pair: pair.chosen.example_id,
        )[:size]
    ]


def measure(path: Path, reference: bool) -> dict[str, float | str]:
    """One measurement, in this process."""
    settings = read_settings(resolve(compose("build_chains", ["setting=paper"]))).preferences
    with Store(path) as store:
        before, began = _peak_mb(), time.process_time()
        pairs = all_at_once(store, settings) if reference else choose_pairs(store.rollouts, settings, 0)
        return {
            "peak_mb": round(_peak_mb() - before, 1),
            "cpu_s": round(time.process_time() - began, 2),
            "pairs": len(pairs),
            "chosen": hashlib.sha256("\n".join(pair.id for pair in pairs).encode()).hexdigest(),
        }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chains", default="9600,96000")
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--reference", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.store is not None:
        print(json.dumps(measure(given.store, given.reference)))
        return
    figures = {}
    for chains in map(int, given.chains.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "store.sqlite"
            fill(path, chains)
            own, other = (
                json.loads(
                    subprocess.check_output(
                        [sys.executable, __file__, "--store", str(path), *more], text=True
                    )
                )
                for more in ((), ("--reference",))
            )
        assert own.pop("chosen") == other.pop("chosen"), "the same pairs"
        figures[str(chains)] = {"streamed": own, "all_at_once": other}
        print(chains, figures[str(chains)], flush=True)
    print(json.dumps({"chains": figures, "same_pairs": True}))


if __name__ == "__main__":
    main()
