"""What all tests share: where real data may lie, and hypothesis without deadlines (machines are noisy)."""

from pathlib import Path

import pytest
from hypothesis import settings

from tagpr.local_ray import prepare_environment

# Ray reads its environment once, when the first test that needs it, or verl, imports it.
prepare_environment()
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
