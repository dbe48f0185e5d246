"""Generation, for any model with the call interface of `taipan.generation.protocol`."""

from taipan.generation.decoding import Decoding, decode, start_decoding
from taipan.generation.engine import GenerateOutput, StepOutput, generate, stream
from taipan.generation.mode import inference
from taipan.generation.prefill import Reading, prefill
from taipan.generation.settings import GenerationSettings
from taipan.generation.speculation import Draft, LookupDraft, ModelDraft

__all__ = [
    "Decoding",
    "Draft",
    "GenerateOutput",
    "GenerationSettings",
    "LookupDraft",
    "ModelDraft",
    "Reading",
    "StepOutput",
    "decode",
    "generate",
    "inference",
    "prefill",
    "start_decoding",
    "stream",
]
