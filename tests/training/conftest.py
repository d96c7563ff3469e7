"""What the tests of training share: a corpus, a tiny configuration, and train.py as a module."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from h_net_dynamic_chunking.training.config import Config

TRAIN_PY = Path(__file__).parents[2] / "train.py"


@pytest.fixture(scope="session")
def train_py() -> Path:
    return TRAIN_PY


@pytest.fixture(scope="session")
def train_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train", TRAIN_PY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    """A text of 27 kB with some structure and some characters of two and three bytes."""
    lines = [f"Line {n} says: {n * n} naïve cats — {'miaow ' * (n % 4)}\n" for n in range(600)]
    path = tmp_path / "corpus.txt"
    path.write_bytes("".join(lines).encode())
    return path


@pytest.fixture
def tiny_config() -> Config:
    return Config(dims=(32, 32, 64), layouts=("m1", "m1", "T1"), batch_size=2, seq_len=32)
