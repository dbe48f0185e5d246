"""Parameters, FLOPs and state bytes of a configuration, by arithmetic alone; tested against the built model."""

from taipan.config import TaipanConfig
from taipan.layer_types import table_of


def parameter_count(config: TaipanConfig) -> int:
    """Trainable parameters of the whole model; tied embeddings count once."""
    total = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2) + config.hidden_size
    for layer, kind in enumerate(config.layer_types):
        total += config.hidden_size + table_of(kind).parameters(config)
        if config.has_mlp(layer):
            total += config.hidden_size + 3 * config.hidden_size * config.intermediate_size
    return total


def flops_per_token(config: TaipanConfig, context: int, *, training: bool = False) -> float:
    """Floating-point operations of all matrix products per token, averaged over a context of `context` tokens.

    A multiply-add counts 2. A SAL counts its attention for the share C of the tokens it selects (its keys and values
    for every token if `key_value_scope` is `all`). Elementwise work is left out; training counts 3 × the forward, and
    the two forwards over `gain_rows` of the rows with which gates that forecast gains measure them.
    """
    total = 2.0 * config.vocab_size * config.hidden_size
    for layer, kind in enumerate(config.layer_types):
        total += table_of(kind).flops(config, context)
        if config.has_mlp(layer):
            total += 6.0 * config.hidden_size * config.intermediate_size
    if not training:
        return total
    measured = 2.0 * config.gain_rows if config.measures_gains else 0.0
    return total * (3.0 + measured)


def state_bytes(config: TaipanConfig, context: int, *, batch: int = 1, bytes_per_value: int = 4) -> int:
    """Bytes of a `DecoderState` after `context` tokens in every row.

    The SSM state is fp32 whatever the weights are; convolution columns, keys and values have `bytes_per_value`. Only
    full attention depends on the context.
    """
    layers = sum(table_of(kind).state_bytes(config, context, bytes_per_value) for kind in config.layer_types)
    return batch * (16 + 8 * config.remembered_tokens + layers)  # position, segment and last tokens of every row
