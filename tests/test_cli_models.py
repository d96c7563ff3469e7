"""Which model an argument of the command line names."""

from typing import Any

import pytest
import torch

from h_net_dynamic_chunking import HNetLM
from h_net_dynamic_chunking.cli.models import load_model


def test_a_name_on_the_hub_goes_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def from_pretrained(name: str, **options: Any) -> str:
        asked.append((name, options))
        return "a model"

    monkeypatch.setattr(HNetLM, "from_pretrained", from_pretrained)
    assert load_model("cartesia-ai/hnet_1stage_L", None, "float32", "cpu") == "a model"
    options = {"device": torch.device("cpu"), "dtype": torch.float32, "smoothing_clamp": None}
    assert asked == [("cartesia-ai/hnet_1stage_L", options)]


@pytest.mark.parametrize("source", ["nothing", "/no/such/folder", "a/b/c", "./model"])
def test_what_is_nothing_is_said(source: str) -> None:
    with pytest.raises(ValueError, match=r"is no preset .*, no directory, no file, and no name on"):
        load_model(source, None, None, "cpu")
