from pathlib import Path

import pytest

from tagpr.checkpoints import export_model
from tagpr.errors import StageError


def test_an_adapter_is_not_handed_over_as_the_trained_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Merger:
        def __init__(self, config: object) -> None:
            self.target = Path(config.target_dir)  # type: ignore[attr-defined]

        def merge_and_save(self) -> None:
            (self.target / "lora_adapter").mkdir(parents=True)
            (self.target / "model.safetensors").write_text("untrained")

        def cleanup(self) -> None:
            pass

    monkeypatch.setattr("verl.model_merger.fsdp_model_merger.FSDPModelMerger", Merger)
    (tmp_path / "actor").mkdir()
    (tmp_path / "actor" / "model_world_size_1_rank_0.pt").write_text("")
    with pytest.raises(StageError, match="holds a LoRA adapter, which is not merged here"):
        export_model(tmp_path / "actor", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="holds no weights"):
        export_model(tmp_path, tmp_path / "model")
