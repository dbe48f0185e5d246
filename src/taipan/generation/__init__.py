"""Generation: works on anything that is called like the model."""

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
