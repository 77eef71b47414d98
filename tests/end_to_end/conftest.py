import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def command_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of commands that tests run: a Prefect home of the tests' own, no hub."""
    home: Path = tmp_path_factory.mktemp("prefect-home")
    return {**os.environ, "PREFECT_HOME": str(home), "HF_HUB_OFFLINE": "1"}
