"""What a model directory says to programs of the Hugging Face world that have not imported Taipan.

`config.json` names, in its `auto_map`, a module beside it. It holds no model: it imports the package, or says what to
install. A program that may run it (`trust_remote_code=True`, `--trust-remote-code`) then knows Taipan.
"""

from pathlib import Path
from typing import Any

from taipan.config import READABLE, TaipanConfig
from taipan.errors import how_to_install

REMOTE_CODE = "modeling_taipan.py"
AUTO_MAP = {
    "AutoConfig": "modeling_taipan.TaipanHFConfig",
    "AutoModel": "modeling_taipan.TaipanModel",
    "AutoModelForCausalLM": "modeling_taipan.TaipanForCausalLM",
    "AutoModelForSequenceClassification": "modeling_taipan.TaipanForSequenceClassification",
}
_MODULE = '''"""Finds the code of this model, which is in the package taipan-lm."""

try:
    from taipan.hf import {classes}
except ImportError as error:
    raise ImportError(
        "This is a Taipan model, whose code is in the package taipan-lm, extra hf: {install} ("
        + str(error)
        + ")."
    ) from error

__all__ = [{names}]
'''


def hub_config(config: TaipanConfig) -> dict[str, Any]:
    """The fields of config.json: ours, and what Hugging Face's Auto classes look for."""
    return {
        "model_type": "taipan",
        "architectures": ["TaipanForCausalLM"],
        "auto_map": AUTO_MAP,
        "max_position_embeddings": READABLE,
        **config.to_dict(),
    }


def write_remote_code(directory: Path) -> None:
    """Write the module that `auto_map` names into an existing directory."""
    classes = sorted({place.rpartition(".")[2] for place in AUTO_MAP.values()})
    names = ", ".join(f'"{name}"' for name in classes)
    text = _MODULE.format(classes=", ".join(classes), install=how_to_install("hf"), names=names)
    (directory / REMOTE_CODE).write_text(text, encoding="utf-8")
