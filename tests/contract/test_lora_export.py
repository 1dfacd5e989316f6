"""What a LoRA run hands over: one model that answers as base and adapter together do."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tagpr.checkpoints import export_model
from tagpr.errors import StageError
from tagpr.tiny_model.tokenizer import build_tokenizer

TOKENS = torch.arange(24).reshape(2, 12)


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, PeftModel]:
    """A checkpoint as verl's FSDP writes it on one process, and the model that it is of."""
    shards = tmp_path / "actor"
    tokenizer = build_tokenizer(0, users=4)
    tokenizer.save_pretrained(shards / "huggingface")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(shards / "huggingface")
    # In bf16 from the start, since merging shards rounds to it.
    base = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    model.to(torch.bfloat16)
    torch.save(model.state_dict(), shards / "model_world_size_1_rank_0.pt")
    # verl's own "whole weights" of such a run.
    (shards / "huggingface" / "model.safetensors").write_bytes(b"the adapter's tensors under other names")
    (shards / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 1}))
    (shards / "lora_train_meta.json").write_text(
        json.dumps({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"})
    )
    return shards, model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.float().eval()(TOKENS).logits


def test_the_merged_model_is_base_and_adapter(trained: tuple[Path, PeftModel], tmp_path: Path) -> None:
    shards, model = trained
    export_model(shards, tmp_path / "model")
    assert not list((tmp_path / "model").glob("*adapter*"))
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert exported.dtype == torch.bfloat16
    together = logits(model)
    with model.disable_adapter():
        alone = logits(model)
    apart = (together - alone).abs().max()
    # The sum is rounded to bf16 once.
    assert (logits(exported) - together).abs().max() < 0.05 * apart


def test_an_adapter_without_its_scale_is_not_handed_over(
    trained: tuple[Path, PeftModel], tmp_path: Path
) -> None:
    shards, _ = trained
    (shards / "lora_train_meta.json").write_text("{}")
    with pytest.raises(StageError, match="does not tell the adapter's lora_alpha"):
        export_model(shards, tmp_path / "model")
    assert not (tmp_path / "model").exists()
