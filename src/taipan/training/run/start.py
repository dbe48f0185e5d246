"""What a run starts from: random weights, or those of a model directory."""

import torch

from taipan.config import TaipanConfig
from taipan.data.tokenizer import TOKENIZER_FILE, Tokenizer
from taipan.errors import ConfigError, shown
from taipan.model import TaipanLM
from taipan.seeding import seeded_generator
from taipan.shipped import model_directory
from taipan.training.recipe import Recipe


def initial_model(recipe: Recipe, config: TaipanConfig, tokenizer: Tokenizer) -> TaipanLM:
    """The model before its first step.

    Args:
        recipe: `model.from` names a model directory; without it the weights are drawn from `training.seed`.
        config: of the model. With `model.from` it may differ from the directory's in what shapes no weight (the gate's
            schedules, the window); thresholds that were calibrated there come along, but for infinite ones (of a
            budget of 0 or 1), from which no step of training leads away.
        tokenizer: of the data.

    Raises:
        ConfigError: the directory's model has other weights, or was trained with another tokenizer.
        CheckpointError: the directory is damaged or incomplete.
    """
    settings = recipe.training
    with torch.random.fork_rng(devices=[]):  # PyTorch's layers draw once more before we do
        model = TaipanLM(
            config, implementation=settings.implementation, generator=seeded_generator(settings.seed, "init")
        )
    if recipe.model.start is None:
        return model
    source = model_directory(recipe.model.start)
    loaded = TaipanLM.from_pretrained(source, implementation=settings.implementation)
    loaded.require_plain("to train from")
    tensors = loaded.state_dict()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    odd = sorted(name for name in {*tensors, *shapes} if name not in tensors or tensors[name].shape != shapes.get(name))
    if odd:
        raise ConfigError(
            f"model.from is {shown(str(source))}, whose weights are not those of the recipe's model: {len(odd)} "
            "differ, "
            f"{odd[0]} for one. Leave model.preset and model.layer_types out to take the directory's configuration, or "
            "make a directory that fits (taipan convert upcycle)."
        )
    if (source / TOKENIZER_FILE).is_file():
        theirs = Tokenizer.load(source)
        if theirs.fingerprint != tokenizer.fingerprint:
            raise ConfigError(
                f"model.from is {shown(str(source))}, which was trained with another tokenizer "
                f"({theirs.vocab_size} ids) than the data were prepared with ({tokenizer.vocab_size} ids): prepare "
                "them with "
                f"`--tokenizer {source}`."
            )
    model.load_state_dict(tensors)  # copied, so in float32 whatever they are stored in
    for sal in model.sals:
        if sal.gate.threshold.isinf():
            sal.gate.threshold.zero_()
    return model
