"""What importing the package does, and the names at its door."""

import subprocess
import sys
from pathlib import Path

import h_net_dynamic_chunking as package

EXTRAS = (
    "assoc_scan",
    "causal_conv1d",
    "einx",
    "flash_attn",
    "huggingface_hub",
    "lm_eval",
    "mamba_ssm",
    "matplotlib",
    "numpy",
    "rich",
    "safetensors",
    "tqdm",
    "transformers",
    "triton",
    "typer",
    "x_transformers",
)


def test_import_is_silent_and_brings_no_extra() -> None:
    """In a process of its own, with every warning an error."""
    program = (
        "import sys, torch; before = set(sys.modules); import h_net_dynamic_chunking; "
        "print('modules:', *{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stderr == ""
    assert result.stdout.startswith("modules:")
    assert result.stdout.count("\n") == 1
    assert not set(result.stdout.split()) & set(EXTRAS)


def test_public_names() -> None:
    assert package.__all__ == [
        "DynamicSequenceChunker",
        "Generated",
        "HNet",
        "HNetConfig",
        "HNetLM",
        "HNetLMOutput",
        "HNetOutput",
        "Intermediates",
        "Outputs",
        "SegmentationStatistics",
        "TextPiece",
        "__version__",
        "generate",
        "ratio_loss",
        "segmentation_statistics",
        "use_backend",
    ]
    assert all(hasattr(package, name) for name in package.__all__)


def test_version_stands_in_one_place() -> None:
    root = Path(__file__).parent.parent
    assert '\nversion = "' not in (root / "pyproject.toml").read_text()
    assert f"version: {package.__version__}" in (root / "CITATION.cff").read_text()
