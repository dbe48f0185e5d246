"""Generation, for any model with the call interface of `taipan.generation.protocol`."""

from taipan.generation.decoding import Decoding, decode, start_decoding
from taipan.generation.engine import GenerateOutput, StepOutput, generate, stream
from taipan.generation.mode import inference
from taipan.generation.prefill import Reading, prefill
from taipan.generation.settings import GenerationSettings

__all__ = [
    "Decoding",
    "GenerateOutput",
    "GenerationSettings",
    "Reading",
    "StepOutput",
    "decode",
    "generate",
    "inference",
    "prefill",
    "start_decoding",
    "stream",
]
