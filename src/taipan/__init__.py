"""Taipan: a long-context language model of Mamba-2 blocks and Selective Attention Layers (arXiv 2410.18572)."""

import gc
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from taipan.layer_types import register_own

if TYPE_CHECKING:
    from taipan.config import TaipanConfig
    from taipan.model import TaipanLM, TaipanOutput
    from taipan.shipped import model_directory, shipped_models
    from taipan.state import DecoderState
    from taipan.text import TextModel, TextScore, TextState, TextStream, load

__version__ = "0.1.0"
__all__ = [
    "DecoderState",
    "TaipanConfig",
    "TaipanLM",
    "TaipanOutput",
    "TextModel",
    "TextScore",
    "TextState",
    "TextStream",
    "load",
    "model_directory",
    "shipped_models",
]

# Lazy (PEP 562), so that `taipan.config` and `taipan --help` need no torch.
_HOMES = {
    "DecoderState": "taipan.state",
    "TaipanConfig": "taipan.config",
    "TaipanLM": "taipan.model",
    "TaipanOutput": "taipan.model",
    "TextModel": "taipan.text",
    "TextScore": "taipan.text",
    "TextState": "taipan.text",
    "TextStream": "taipan.text",
    "load": "taipan.text",
    "model_directory": "taipan.shipped",
    "shipped_models": "taipan.shipped",
}

register_own()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(_imported(_HOMES[name]), name)
    raise AttributeError(f"module 'taipan' has no attribute {name!r}")


def _imported(module: str) -> ModuleType:
    """A module; garbage is not looked for meanwhile: there is none, and every look walks all that torch has made."""
    looking = gc.isenabled()
    gc.disable()
    try:
        return import_module(module)
    finally:
        if looking:
            gc.enable()
