from pathlib import Path

import pytest

from tagpr.checkpoints import export_model
from tagpr.errors import StageError


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="holds no weights"):
        export_model(tmp_path, tmp_path / "model")
