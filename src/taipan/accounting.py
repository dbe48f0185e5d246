"""Parameters, FLOPs and state bytes of a configuration, by arithmetic alone; tested against the built model."""

from taipan.config import TaipanConfig


def _attention_parameters(config: TaipanConfig) -> int:
    query = config.num_attention_heads * config.head_dim
    return config.hidden_size * (2 * query + 2 * config.kv_heads * config.head_dim)


def _gate_parameters(config: TaipanConfig) -> int:
    if config.gate == "linear":
        return 2 * config.hidden_size + 2
    return config.gate_hidden_size * (config.hidden_size + 1) + 2 * config.gate_hidden_size + 2


def _mamba_linear_parameters(config: TaipanConfig) -> int:
    return config.hidden_size * (
        2 * config.inner_size + 2 * config.n_groups * config.state_size + config.num_mamba_heads
    ) + (config.inner_size * config.hidden_size)


def _mixer_parameters(config: TaipanConfig, kind: str) -> int:
    if kind == "mamba2":
        conv = config.conv_size * (config.conv_kernel + 1)
        return _mamba_linear_parameters(config) + conv + 3 * config.num_mamba_heads + config.inner_size
    gate = _gate_parameters(config) if kind == "selective_attention" else 0
    return _attention_parameters(config) + gate


def parameter_count(config: TaipanConfig) -> int:
    """Trainable parameters of the whole model; tied embeddings count once."""
    total = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2) + config.hidden_size
    for layer, kind in enumerate(config.layer_types):
        total += config.hidden_size + _mixer_parameters(config, kind)
        if config.has_mlp(layer):
            total += config.hidden_size + 3 * config.hidden_size * config.intermediate_size
    return total


def _attended_keys(config: TaipanConfig, kind: str, context: int) -> float:
    """Mean number of keys a query meets over a context of this length."""
    window = context if kind == "full_attention" else min(config.sliding_window, context)
    # the first `window` queries meet 1 … window keys, the others `window`
    mean = (window * (window + 1) / 2 + (context - window) * window) / context
    if kind == "selective_attention" and config.key_value_scope == "selected" and config.window_unit == "positions":
        return config.attention_capacity * mean
    return mean


def flops_per_token(config: TaipanConfig, context: int, *, training: bool = False) -> float:
    """Floating-point operations of all matrix products per token, averaged over a context of `context` tokens.

    A multiply-add counts 2. A SAL counts its attention for the share C of the tokens it selects (its keys and values
    for every token if `key_value_scope` is `all`). Elementwise work is left out; training counts 3 × the forward.
    """
    hidden, inner = config.hidden_size, config.inner_size
    total = 2.0 * config.vocab_size * hidden
    chunk = min(config.chunk_size, context)
    for layer, kind in enumerate(config.layer_types):
        if kind == "mamba2":
            total += 2.0 * _mamba_linear_parameters(config) + 2.0 * config.conv_kernel * config.conv_size
            # within a chunk: C·Bᵀ per group and the masked product with x; between chunks: states in and out
            total += 2.0 * chunk * (config.n_groups * config.state_size + inner) + 4.0 * config.state_size * inner
        else:
            query = 2.0 * hidden * config.num_attention_heads * config.head_dim
            key_value = 4.0 * hidden * config.kv_heads * config.head_dim
            keys = _attended_keys(config, kind, context)
            attend = 4.0 * keys * config.num_attention_heads * config.head_dim
            if kind == "selective_attention":
                share = config.attention_capacity
                total += 2.0 * _gate_parameters(config)
                total += share * (2 * query + attend) + key_value * (1.0 if config.key_value_scope == "all" else share)
            else:
                total += 2 * query + key_value + attend
        if config.has_mlp(layer):
            total += 6.0 * hidden * config.intermediate_size
    return total * (3.0 if training else 1.0)


def state_bytes(config: TaipanConfig, context: int, *, batch: int = 1, bytes_per_value: int = 4) -> int:
    """Bytes of a `DecoderState` after `context` tokens in every row.

    The SSM state is fp32 whatever the weights are; convolution columns, keys and values have `bytes_per_value`. Only
    full attention depends on the context.
    """
    total = 16 * batch  # position and segment of every row
    for kind in config.layer_types:
        if kind == "mamba2":
            total += batch * config.inner_size * config.state_size * 4
            total += batch * (config.conv_kernel - 1) * config.conv_size * bytes_per_value
        else:
            slots = context if kind == "full_attention" else config.sliding_window
            if kind == "selective_attention" and config.attention_capacity == 0:
                slots = 0
            total += batch * (slots * (2 * config.kv_heads * config.head_dim * bytes_per_value + 8) + 8)
    return total
