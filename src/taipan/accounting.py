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
    what gates that forecast gains measure them with: two forwards over `gain_rows` of the rows; for `flipped` gains one
    from the first gate's layer on, and the head for the flipped tokens, twice.
    """
    head = 2.0 * config.vocab_size * config.hidden_size
    layers = [table_of(kind).flops(config, context) for kind in config.layer_types]
    for layer in range(config.num_hidden_layers):
        if config.has_mlp(layer):
            layers[layer] += 6.0 * config.hidden_size * config.intermediate_size
    total = head + sum(layers)
    if not training:
        return total
    if not config.measures_gains:
        return total * 3.0
    if config.gain_measure == "open_closed":
        return total * (3.0 + 2.0 * config.gain_rows)
    again = sum(layers[config.layer_types.index("selective_attention") :])
    flipped = 1.0 - (1.0 - config.gain_flips) ** config.layer_types.count("selective_attention")
    return total * 3.0 + config.gain_rows * (again + 2.0 * flipped * head)


def state_bytes(config: TaipanConfig, context: int, *, batch: int = 1, bytes_per_value: int = 4) -> int:
    """Bytes of a `DecoderState` after `context` tokens in every row.

    The SSM state is fp32 whatever the weights are; convolution columns, keys and values have `bytes_per_value`. Only
    full attention depends on the context.
    """
    layers = sum(table_of(kind).state_bytes(config, context, bytes_per_value) for kind in config.layer_types)
    return batch * (16 + 8 * config.remembered_tokens + layers)  # position, segment and last tokens of every row
