"""How well clustering recovers, from noisy free tags, the kinds of step that the SIMULATED tagger has in mind (S9, S10).

    python tests/perf/clustering.py [--seeds 5] [--chains 400] [--embedder offline]

For each setting of the weights and each seed: chains of MiniLaMP, tagged freely, clustered, compared with the kind that the
grammar of MiniLaMP's sentences gives each segment. Agreement is bounded by what the tagger got wrong itself: ``ceiling`` is
that of an oracle that puts every distinct tag into the kind that it most often stands for. ``names`` compares the distinct
tags alone: are all names of one kind in one cluster? The last line of standard output is one JSON object.
"""

import argparse
import json
import random
import time
from collections import Counter
from typing import Any

from sklearn.metrics import adjusted_rand_score, v_measure_score

from data_pipeline.clustering import cluster, normalise
from data_pipeline.exploratory import ExploratoryTagging, Proposal
from data_pipeline.settings import ChainSettings, ContextWeights, read_settings
from data_pipeline.simulated_tagger import FREE_TAGS, SimulatedTagger
from tagpr.benchmarks.minilamp import reader
from tagpr.benchmarks.minilamp.generate import draw
from tagpr.benchmarks.minilamp.world import TASK_NAMES, population
from tagpr.configuration import compose, resolve
from tagpr.schema import Chain

WEIGHTS = {
    "default": ContextWeights(name=0.5, purposes=1.0, segments=1.0),
    "names only": ContextWeights(name=1.0, purposes=0.0, segments=0.0),
    "names and segments": ContextWeights(name=0.5, purposes=0.0, segments=1.0),
    "segments only": ContextWeights(name=0.0, purposes=0.0, segments=1.0),
    "purposes only": ContextWeights(name=0.0, purposes=1.0, segments=0.0),
}
# MiniLaMP's chains never verify by default; with this share of verifications all nine kinds occur.
VERIFY = {"nine kinds": 0.3, "eight kinds": 0.0}


def proposals(settings: ChainSettings, chains: int, seed: int, verify: float) -> list[Proposal]:
    """Free tags for so many chains; a malformed reply is asked for twice more."""
    tagger = SimulatedTagger(settings.prompts, settings.simulated)
    tagging = ExploratoryTagging.load(settings.prompts.exploratory_tagging)
    rng = random.Random(seed)
    users = population(seed, 80)
    found: list[Proposal] = []
    for number in range(chains):
        task = TASK_NAMES[number % len(TASK_NAMES)]
        question, gold = draw(task, rng.choice(users), rng)
        reasoned = reader.reason(question, rng, reader.FaultRates(verify=verify))
        chain = Chain(
            id=str(number), example_id=str(number), task=task, user_id="u", prompt=question, gold=gold, rollout=0,
            reasoning=reader.untagged(reasoned.steps), answer=reasoned.answer, verifiable=1.0,
        )  # fmt: skip
        prompt = tagging.prompt(question, chain.reasoning)
        for _ in range(3):
            read, problem = tagging.accept(chain, tagger.reply(prompt, rng))
            if not problem:
                found += read
                break
    return found


def measure(
    found: list[Proposal], settings: ChainSettings, weights: ContextWeights, seed: int
) -> dict[str, Any]:
    """K, silhouette and agreement of one clustering."""
    started = time.perf_counter()
    result = cluster(found, settings.exploratory.model_copy(update={"weights": weights}), seed)
    seconds = time.perf_counter() - started
    true = [reader.segment(each.segment)[0][0] for each in found]
    of = result.cluster_of()
    key = {spelling: tag.key for tag in result.tags for spelling in tag.spellings}
    guessed = [of[key[each.tag]] for each in found]
    stands_for: dict[str, Counter[str]] = {}
    for each, kind in zip(found, true, strict=True):
        stands_for.setdefault(key[each.tag], Counter())[kind] += 1
    oracle = [stands_for[key[each.tag]].most_common(1)[0][0] for each in found]
    kind_of = {normalise(name): kind for kind, names in FREE_TAGS.items() for name in names}
    known = [(kind_of[tag.name], of[tag.key]) for tag in result.tags if tag.name in kind_of]
    return {
        "proposals": len(found),
        "distinct": len(result.tags),
        "kinds": len(set(true)),
        "k": len(result.clusters),
        "silhouette": result.silhouette,
        "ari": float(adjusted_rand_score(true, guessed)),
        "v": float(v_measure_score(true, guessed)),
        "ceiling_ari": float(adjusted_rand_score(true, oracle)),
        "names_ari": float(adjusted_rand_score(*zip(*known, strict=True))),
        "seconds": seconds,
    }


def main() -> None:
    """Print a table and the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--chains", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--embedder", default="offline")
    arguments = parser.parse_args()
    settings = read_settings(
        resolve(compose("build_chains", [f"chains.exploratory.embedder={arguments.embedder}"]))
    )
    figures: dict[str, Any] = {"simulated": True, "embedder": arguments.embedder, "runs": []}
    print(
        f"{'world':12} {'chains':>6} {'weights':20} {'K':>12} {'ARI':>6} {'ceiling':>8} {'V':>6} {'names':>6} {'s':>5}"
    )
    for world, verify in VERIFY.items():
        for chains in arguments.chains:
            drawn = [proposals(settings, chains, seed, verify) for seed in range(arguments.seeds)]
            for label, weights in WEIGHTS.items():
                runs = [measure(found, settings, weights, seed) for seed, found in enumerate(drawn)]
                mean = {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}
                chosen = " ".join(str(run["k"]) for run in runs)
                print(
                    f"{world:12} {chains:6} {label:20} {chosen:>12} {mean['ari']:6.3f} {mean['ceiling_ari']:8.3f} "
                    f"{mean['v']:6.3f} {mean['names_ari']:6.3f} {mean['seconds']:5.2f}"
                )
                figures["runs"].append({"world": world, "chains": chains, "weights": label, "seeds": runs})
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
