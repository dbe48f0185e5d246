"""The Hugging Face face: importing this package registers Taipan with transformers' Auto classes.

`AutoConfig`, `AutoModelForCausalLM` and `AutoTokenizer` then know model directories of `model_type: taipan`, whichever
face wrote them.
"""

import importlib
import sys

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from taipan.hf.cache import TaipanCache
from taipan.hf.callbacks import GateScheduleCallback
from taipan.hf.configuration import TaipanHFConfig
from taipan.hf.conversion import from_mamba2, to_mamba2
from taipan.hf.modeling import TaipanForCausalLM, TaipanForSequenceClassification, TaipanModel
from taipan.hf.output import TaipanCausalLMOutput, TaipanModelOutput
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
# There are two: importing processing_utils puts another in the place of the first, which earlier importers keep.
importlib.import_module("transformers.processing_utils")
for module in (transformers, sys.modules["transformers"]):
    for face in (TaipanForCausalLM, TaipanForSequenceClassification, TaipanModel):
        setattr(module, face.__name__, face)
# Trainer's label smoothing shifts the labels of the classes named here only.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[TaipanHFConfig.model_type] = TaipanForCausalLM.__name__
