"""The Hugging Face face: importing this package registers Taipan with transformers' Auto classes.

`AutoConfig`, `AutoModelForCausalLM` and `AutoTokenizer` then know model directories of `model_type: taipan`, whichever
face wrote them.
"""

import importlib
import sys

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from taipan.hf.cache import TaipanCache
from taipan.hf.callbacks import GateScheduleCallback
from taipan.hf.configuration import TaipanHFConfig
from taipan.hf.conversion import from_mamba2, to_mamba2
from taipan.hf.modeling import TaipanForCausalLM
from taipan.hf.output import TaipanCausalLMOutput

__all__ = [
    "GateScheduleCallback",
    "TaipanCache",
    "TaipanCausalLMOutput",
    "TaipanForCausalLM",
    "TaipanHFConfig",
    "from_mamba2",
    "to_mamba2",
]

AutoConfig.register(TaipanHFConfig.model_type, TaipanHFConfig, exist_ok=True)
AutoModelForCausalLM.register(TaipanHFConfig, TaipanForCausalLM, exist_ok=True)
# our tokenizer.json needs no class of its own
AutoTokenizer.register(TaipanHFConfig, tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
# `transformers serve` and TRL's trainers look a class up in their module `transformers`, by its name in config.json.
# There are two: importing processing_utils puts another in the place of the first, which earlier importers keep.
importlib.import_module("transformers.processing_utils")
for module in (transformers, sys.modules["transformers"]):
    setattr(module, TaipanForCausalLM.__name__, TaipanForCausalLM)
