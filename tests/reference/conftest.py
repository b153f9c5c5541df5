from __future__ import annotations

from pathlib import Path

import pytest
from ldm_reference.train_config import TrainConfig

from tests.tiny_recipe import CONFIG
from tests.training import config_from, write_pictures


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return config_from(CONFIG, tmp_path)
