"""``--dry-run``: the arithmetic of every stage and tested hardware, in text, without torch or Ray."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import save_file

import tagpr.config
from tagpr import dry_run as module
from tagpr.dry_run import dry_run
from tagpr.errors import ConfigError, DataError
from tagpr.model_shapes import KNOWN, read_header, read_shape, shape_of

RL_HARDWARE = sorted(
    path.stem for path in (Path(tagpr.config.__file__).parent / "rl_hardware").glob("*.yaml")
)
URL = "prmu_client.url=http://prmu:8200"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "local_gpus", lambda: [])
    return tmp_path


@pytest.mark.parametrize("hardware", RL_HARDWARE)
@pytest.mark.parametrize(
    ("stage", "steps"), [("guided_rl", "845 = 13 epochs of 65"), ("exploratory_rl", "130 = 2 epochs of 65")]
)
def test_the_papers_setting_on_every_hardware(stage: str, steps: str, hardware: str) -> None:
    text = dry_run(stage, ["setting=paper", f"rl_hardware={hardware}", URL])
    assert steps in text
    assert "8,320" in text
    assert "640 = 128 prompts x 5" in text
    assert "8,190,735,360 parameters" in text
    assert "(new)" in text
    # One of 80 GB with LoRA, and eight and more without, are the tested ones: nothing is warned of but the disk here.
    if hardware not in ("cpu", "gpu"):
        assert "may not fit" not in text
        assert "no room" not in text


def test_one_gpu_without_lora_does_not_fit() -> None:
    assert "the update may not fit" in dry_run("guided_rl", ["setting=paper", "rl_hardware=gpu"])


def test_what_differs_from_the_defaults_is_said() -> None:
    text = dry_run("guided_rl", ["setting=paper", "rl_hardware=gpu8", "objective.gamma=0"])
    assert "objective.gamma" in text
    assert "0.2 -> 0" in text
    assert "1 differ from the defaults" in text
    assert "paths.prmu=" not in text


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainer.n_gpus_per_node=6", "do not divide over 6"),
        (
            "actor_rollout_ref.rollout.tensor_model_parallel_size=3",
            "does not divide trainer.n_gpus_per_node=8",
        ),
        ("actor_rollout_ref.actor.ulysses_sequence_parallel_size=3", "does not divide the 8 GPUs"),
        ("actor_rollout_ref.actor.ppo_max_token_len_per_gpu=4096", "less than the 8192 tokens"),
        ("actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=4096", "less than the 8192 tokens"),
        ("trainer.nnodes=0", "nobody to train"),
        ("trainer.nnodes=2", "prmu_client.url=null"),
        ("launch.preflight=maybe", "launch.preflight=maybe"),
        ("data.train_batch_size=16384", "larger than the 8320 prompts"),
    ],
)
def test_what_does_not_divide_is_one_line(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        dry_run("guided_rl", ["setting=paper", "rl_hardware=gpu8", override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "stage", ["sft", "train_prmu", "evaluate", "prepare_data", "build_chains", "serve_prmu"]
)
@pytest.mark.parametrize("setting", ["minilamp", "paper"])
def test_every_stage_has_one(stage: str, setting: str) -> None:
    text = dry_run(stage, [f"setting={setting}"], ["base"])
    assert text.startswith(f"{stage} --dry-run")
    assert "makes first" in text


def test_sft_batches_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match="does not divide over 6 GPUs"):
        dry_run("sft", ["setting=paper", "sft_hardware=gpu", "trainer.n_gpus_per_node=6"])


def test_disk_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**30})())
    assert "not enough" in dry_run("guided_rl", ["setting=paper", "rl_hardware=gpu8"])


def test_the_command_is_light_and_leaves_nothing(elsewhere: Path) -> None:
    code = (
        "import sys; from tagpr.stages import main; status = main(['guided_rl', 'setting=paper', 'rl_hardware=gpu8', '--dry-run']);"
        "print([m for m in ('torch', 'ray', 'verl', 'transformers') if m in sys.modules]); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=elsewhere
    )
    assert done.stdout.strip().endswith("[]")
    assert list(elsewhere.iterdir()) == []


# shapes


def test_parameters_counted_from_a_description_and_from_weights(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    described = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 48, "vocab_size": 100, "tie_word_embeddings": False,
    }  # fmt: skip
    model = Qwen3ForCausalLM(Qwen3Config(**described))
    shape = shape_of({"model_type": "qwen3", **described})
    assert shape is not None
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    assert shape.kv_values == 2 * 2 * 2 * 16
    linear = sum(
        8 * (layer.in_features + layer.out_features)
        for name, layer in model.model.layers.named_modules()
        if type(layer).__name__ == "Linear"
    )
    assert shape.lora_parameters(8) == linear
    model.save_pretrained(tmp_path)
    assert read_shape(str(tmp_path)) == shape


def test_the_papers_model_is_known() -> None:
    shape = shape_of(KNOWN["Qwen/Qwen3-8B"])
    assert shape is not None
    assert shape.parameters == 8_190_735_360


@pytest.mark.parametrize("cut", [0, 4, 20, -1])
def test_a_torn_file_of_weights_is_told(tmp_path: Path, cut: int) -> None:
    import numpy as np

    file = tmp_path / "model.safetensors"
    save_file({"a": np.zeros((3, 4), np.float32)}, file)
    assert list(read_header(file)) == ["a"]
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match="safetensors"):
        read_header(file)
