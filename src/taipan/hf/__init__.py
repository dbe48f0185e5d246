"""The Hugging Face face: importing this package registers Taipan with transformers' Auto classes.

`AutoConfig`, `AutoModelForCausalLM` and `AutoTokenizer` then know model directories of `model_type: taipan`, whichever
face wrote them.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from taipan.errors import shown
from taipan.hf.cache import TaipanCache
from taipan.hf.configuration import TaipanHFConfig
from taipan.hf.conversion import from_mamba2, to_mamba2
from taipan.hf.modeling import TaipanForCausalLM, TaipanForSequenceClassification, TaipanModel
from taipan.hf.output import TaipanCausalLMOutput, TaipanModelOutput

if TYPE_CHECKING:
    from taipan.hf.callbacks import GateScheduleCallback
    from taipan.hf.trainer import prepare_trainer

__all__ = [
    "GateScheduleCallback",
    "TaipanCache",
    "TaipanCausalLMOutput",
    "TaipanForCausalLM",
    "TaipanForSequenceClassification",
    "TaipanHFConfig",
    "TaipanModel",
    "TaipanModelOutput",
    "from_mamba2",
    "prepare_trainer",
    "to_mamba2",
]

AutoConfig.register(TaipanHFConfig.model_type, TaipanHFConfig, exist_ok=True)
AutoModel.register(TaipanHFConfig, TaipanModel, exist_ok=True)
AutoModelForSequenceClassification.register(TaipanHFConfig, TaipanForSequenceClassification, exist_ok=True)
AutoModelForCausalLM.register(TaipanHFConfig, TaipanForCausalLM, exist_ok=True)
# our tokenizer.json needs no class of its own
AutoTokenizer.register(TaipanHFConfig, tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
# `transformers serve` and TRL's trainers look a class up in their module `transformers`, by its name in config.json.
# There are two: importing processing_utils puts another in the place of the first, which earlier importers keep. In a
# program that found this package through a model directory they are many.
importlib.import_module("transformers.processing_utils")
_IMPORTED = [getattr(importer, "__dict__", {}).get("transformers") for importer in list(sys.modules.values())]
for module in (*_IMPORTED, sys.modules["transformers"]):
    if isinstance(module, ModuleType) and module.__name__ == "transformers":
        for face in (TaipanForCausalLM, TaipanForSequenceClassification, TaipanModel):
            setattr(module, face.__name__, face)
# Trainer's label smoothing shifts the labels of the classes named here only.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[TaipanHFConfig.model_type] = TaipanForCausalLM.__name__
# transformers' own module of callbacks imports peft, and peft bitsandbytes, wherever they are installed: seconds that
# whoever loads a model need not spend.
_TRAINING = {"GateScheduleCallback": "taipan.hf.callbacks", "prepare_trainer": "taipan.hf.trainer"}


def __getattr__(name: str) -> Any:
    """What belongs to a Trainer, imported when it is first asked for."""
    if name not in _TRAINING:
        raise AttributeError(f"module 'taipan.hf' has no attribute {shown(name)}")
    return getattr(importlib.import_module(_TRAINING[name]), name)
