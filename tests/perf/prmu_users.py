"""What a million user rows cost: time and memory to add, train, save, load and look up; the last line is one JSON object.

    python tests/perf/prmu_users.py [--users 1000000] [--hidden 128] [--layers 2]

Each stage of a PRMU's life in a process of its own, so that its peak of memory is its own, once with all users and once with
ten: the difference is what the rows cost. ``bytes_by_hidden`` is arithmetic for other hidden sizes: the rows in the checkpoint
(bfloat16 and float32), and in training (float32 rows, two moments and a count of updates).
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit")]

import torch  # noqa: E402
from prmu_tiny import make_tokenizer  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from tagpr.prmu import model as prmu_model  # noqa: E402
from tagpr.prmu.encoding import USERS_FILE, UserRows  # noqa: E402
from tagpr.prmu.rows import put_back, take_out  # noqa: E402
from tagpr.prmu.state import latest_state, restore_state, save_state  # noqa: E402

FEW = 10
BATCH = 64
LOOKUPS = 1000


def stages(folder: Path, count: int) -> tuple[dict[str, Callable[[], None]], dict[str, float]]:
    """What is timed, in order, and where the times go."""
    seconds: dict[str, float] = {}
    model: Any = None
    users: Any = None
    rows: Any = None
    tokenizer: Any = None

    def build() -> None:
        nonlocal model, users, tokenizer
        ids = [f"user-{number:07d}" for number in range(count)]
        model, tokenizer, users = prmu_model.build(
            str(folder / "base"), ids, row_std=0.05, max_tokens=512, seed=0, place="ends"
        )

    def steps() -> None:
        nonlocal rows
        rows = take_out(model, users)
        generator = torch.Generator().manual_seed(0)
        for _ in range(10):
            index = torch.randperm(count + 1, generator=generator)[:BATCH]
            rows.step(index, torch.randn(len(index), rows.rows.shape[1], generator=generator), 1e-3)

    def checkpoint() -> None:
        save_state(folder / "state", 1, "", model, torch.optim.AdamW(model.parameters()), rows)

    def resume() -> None:
        found = latest_state(folder / "state", "")
        assert found
        restore_state(found[1], model, torch.optim.AdamW(model.parameters()), rows)

    def save() -> None:
        put_back(model, users, rows.rows)
        prmu_model.save(folder / "model", model, tokenizer, users, "{}")

    return {
        "build": build,
        "ten_steps": steps,
        "checkpoint": checkpoint,
        "resume": resume,
        "save": save,
    }, seconds


def child(folder: Path, part: str, count: int) -> dict[str, float]:
    """One process: ``train`` (build to save) or ``serve`` (load, look up)."""
    torch.set_num_threads(1)
    before = _peak()
    if part == "train":
        parts, seconds = stages(folder, count)
        for name, do in parts.items():
            began = time.perf_counter()
            do()
            seconds[name] = time.perf_counter() - began
    else:
        began = time.perf_counter()
        UserRows.read(folder / "model")
        read = time.perf_counter()
        prmu = prmu_model.load(folder / "model")
        loaded = time.perf_counter()
        for number in range(LOOKUPS):
            user = f"user-{number * 7919 % count:07d}"
            found = prmu.encoder.encode("x", user, "which tag", "boats")
            assert not found.unknown_user
            assert found.token_ids[0] == found.token_ids[-1] == prmu.encoder.users.rows[user]
        seconds = {
            "read_map": read - began, "load": loaded - read,
            "encode_each": (time.perf_counter() - loaded) / LOOKUPS,
        }  # fmt: skip
        ids = [found.token_ids]
        assert prmu_model.score_tokens(prmu.model, ids, prmu.encoder.pad_token_id).isfinite().all()
    return seconds | {"peak_mib": _peak(), "start_mib": before}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Run and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        folder, part, count = given.child
        print(json.dumps(child(Path(folder), part, int(count))))
        return
    figures: dict[str, Any] = {"users": given.users, "hidden": given.hidden}
    for count in (FEW, given.users):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tokenizer = make_tokenizer()
            config = Qwen3Config(
                vocab_size=len(tokenizer), hidden_size=given.hidden, intermediate_size=2 * given.hidden,
                num_hidden_layers=given.layers, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                tie_word_embeddings=True,
            )  # fmt: skip
            Qwen3ForCausalLM(config).save_pretrained(folder / "base")
            tokenizer.save_pretrained(folder / "base")
            found = {}
            for part in ("train", "serve"):
                command = [sys.executable, __file__, "--child", name, part, str(count)]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
                found[part] = {
                    key: round(value, 5) for key, value in json.loads(done.stdout.splitlines()[-1]).items()
                }
            found["files_mib"] = {
                each: round((folder / "model" / each).stat().st_size / 2**20, 2)
                for each in ("model.safetensors", USERS_FILE)
            }
            figures[str(count)] = found
            print(json.dumps({count: found}), file=sys.stderr, flush=True)
    figures["bytes_by_hidden"] = {
        hidden: {
            "checkpoint_bfloat16": given.users * hidden * 2, "checkpoint_float32": given.users * hidden * 4,
            "training": given.users * (3 * hidden * 4 + 4),
        }
        for hidden in (given.hidden, 1024)
    }  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
