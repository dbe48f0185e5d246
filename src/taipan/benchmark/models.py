"""The models to measure: named configurations with random weights, or model directories."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taipan.benchmark.settings import Settings, require_known
from taipan.config import TaipanConfig
from taipan.errors import ConfigError
from taipan.hardware import training_dtype
from taipan.model import TaipanLM
from taipan.model.directory import PRECISE
from taipan.native.memory import in_large_pages
from taipan.seeding import seeded_generator
from taipan.shipped import model_directory, shipped_models

_GROUP = ["mamba2"] * 6 + ["selective_attention"]
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "mamba2-6m": {"vocab_size": 4096, "hidden_size": 320, "layer_types": ["mamba2"] * 6},
    "mamba2-30m": {"vocab_size": 16_384, "hidden_size": 384, "layer_types": ["mamba2"] * 24},
    "mamba2-115m": {"vocab_size": 32_000, "hidden_size": 768, "layer_types": ["mamba2"] * 24},
    "taipan-30m": {
        "vocab_size": 16_384,
        "hidden_size": 384,
        "layer_types": _GROUP * 3,
        "intermediate_size": 1024,
        "num_attention_heads": 6,
    },
}
"""Further sizes for the benchmark, beside the presets and the quickstart's model."""
QUICKSTART = "quickstart"

_CALIBRATION_TOKENS = 4096


def names() -> list[str]:
    """Every model that has a name."""
    return [QUICKSTART, *CONFIGURATIONS, *TaipanConfig.presets()]


def configuration(model: str) -> TaipanConfig:
    """The configuration of a named model or of a model directory.

    Raises:
        ConfigError: the name is unknown and no directory, or the directory's config.json is damaged.
    """
    if model == QUICKSTART:
        from taipan.experiments.quickstart import quickstart_recipe

        section = quickstart_recipe(Path("runs/quickstart")).model
        return section.config(section.overrides["vocab_size"], None)
    if model in CONFIGURATIONS:
        return TaipanConfig.from_dict(CONFIGURATIONS[model])
    directory = model_directory(model)
    if directory.is_dir():
        return TaipanConfig.from_json_file(directory / "config.json")
    if "/" in model:
        known = ", ".join((*names(), *shipped_models()))
        raise ConfigError(f"{model} is no directory: expected a model directory, or one of {known}.")
    require_known("model", model, (*names(), *shipped_models()))
    return TaipanConfig.preset(model)


def dtype_of(settings: Settings) -> torch.dtype:
    """The dtype of the settings, with `auto` resolved for this machine."""
    return torch.bfloat16 if training_dtype(settings.dtype).dtype == "bfloat16" else torch.float32


def build(settings: Settings, dtype: torch.dtype) -> TaipanLM:
    """The model in eval mode with parameters of a dtype.

    A named model has random weights, and thresholds with which its gates select the share C of random tokens, as in a
    trained model. Its memory layout is that of `from_pretrained`.
    """
    if settings.model not in names():
        configuration(settings.model)
        return TaipanLM.from_pretrained(settings.model, dtype=dtype, implementation=settings.implementation)
    config = configuration(settings.model)
    generator = seeded_generator(settings.seed, "weights")
    model = TaipanLM(config, implementation=settings.implementation, generator=generator).eval()
    if model.sals and config.attention_capacity > 0:
        from taipan.training.run.calibration import calibrate

        calibrate(model, [{"tokens": random_tokens(config, 1, _CALIBRATION_TOKENS, settings.seed)}])
    for name, parameter in model.named_parameters():
        if not name.endswith(PRECISE):
            parameter.data = parameter.data.to(dtype)
    parameters = list(model.parameters())
    for parameter, copy in zip(parameters, in_large_pages(parameters), strict=True):
        parameter.data = copy
    return model


def random_tokens(config: TaipanConfig, batch: int, tokens: int, seed: int) -> Tensor:
    """Uniform token ids, int64 (batch, tokens)."""
    return torch.randint(config.vocab_size, (batch, tokens), generator=seeded_generator(seed, "tokens"))
