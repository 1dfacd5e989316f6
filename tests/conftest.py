"""What all tests share: where real data may lie, and hypothesis without deadlines (machines are noisy)."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("tagpr", deadline=None)
settings.load_profile("tagpr")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real benchmark files beside the project; not part of it."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder
