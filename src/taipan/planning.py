"""What a recipe needs of every GPU, by arithmetic: memory, communication, time. Estimates; nothing is run.

Weights, gradients and moments are counted exactly. Activations count what the portable ops keep for the backward pass
(a test compares them with what autograd keeps: within a factor of two for every kind of layer); fused kernels keep
less. Not counted: PyTorch's context and fragmentation (some GB on a GPU), and the peak inside an op. Time is FLOPs over
what you say the hardware reaches.
"""

from dataclasses import dataclass

from taipan.accounting import flops_per_token, parameter_count
from taipan.config import TaipanConfig
from taipan.errors import ConfigError
from taipan.layer_types import table_of
from taipan.training.processes.parallel import Strategy
from taipan.training.recipe import Recipe

_LOGITS = 2**21
_LOGIT_ROWS = 128


@dataclass(frozen=True)
class Cluster:
    """The hardware, in numbers that the reader knows better than we do.

    Attributes:
        gpus: processes, one per GPU.
        gpus_per_node: of one machine; `hsdp` shards within it.
        flops: of matrix products of one GPU in the recipe's dtype, per second, at its peak.
        utilisation: share of that peak that training reaches.
        bandwidth: bytes per second that one GPU sends and receives in a collective.
    """

    gpus: int
    gpus_per_node: int = 8
    flops: float = 312e12
    utilisation: float = 0.35
    bandwidth: float = 100e9


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the peak of a step.

    Attributes:
        weights, gradients, optimizer: this GPU's share, fp32.
        gathered: what sharding puts together for a while: two blocks, embedding and head, and all gradients while
            they accumulate unreduced.
        copies: weights cast to bfloat16 for their products.
        activations: kept for the backward pass.
        logits: of one chunk, with their gradient and that of the head.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    copies: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The sum."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.gathered
            + self.copies
            + self.activations
            + self.logits
        )


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step: its products, and its communication if none of it is hidden behind them."""

    compute: float
    communication: float


def activation_bytes(config: TaipanConfig, layer: int, context: int, *, narrow: int) -> float:
    """Bytes per token that the backward pass of one block needs.

    Args:
        config: the model.
        layer: number of the block.
        context: tokens of a window.
        narrow: bytes of a value that goes into a product: 2 under bfloat16 autocast, else 4.
    """
    hidden, table = config.hidden_size, table_of(config.layer_types[layer])
    cast = hidden * narrow if narrow < 4 else 0
    # the norm: input and output in fp32, and the output as products take it
    total = 8 * hidden + cast + table.activation_bytes(config, context, narrow)
    if config.has_mlp(layer):
        total += 8 * hidden + cast + 4 * config.intermediate_size * narrow
    return total


def memory(
    recipe: Recipe, config: TaipanConfig, cluster: Cluster, strategy: Strategy, *, recompute: bool, bfloat16: bool
) -> Memory:
    """Memory of one GPU.

    Args:
        recipe: batch, context, optimizer.
        config: its model.
        cluster: the hardware.
        strategy: how the model is spread.
        recompute: as in the recipe.
        bfloat16: whether products are in bfloat16 (autocast over fp32 weights).

    Raises:
        ConfigError: the processes cannot share the batch equally.
    """
    settings, gpus = recipe.training, cluster.gpus
    if settings.batch_size % gpus:
        raise ConfigError(
            f"training.batch_size is {settings.batch_size}, which {gpus} GPUs cannot share equally: take a multiple of "
            f"{gpus} (and less training.accumulation, {settings.accumulation} now, for the same tokens per step)."
        )
    parameters = parameter_count(config)
    shards = shard_count(cluster, strategy)
    narrow = 2 if bfloat16 else 4
    ends = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    block = (parameters - ends) / max(1, config.num_hidden_layers)
    gathered = 0.0
    if shards > 1:
        gathered = 4 * (2 * block + ends) + 4 * (parameters if settings.accumulation > 1 else block + ends)
    tokens = settings.batch_size // gpus * recipe.data.context_length
    blocks = [
        activation_bytes(config, layer, recipe.data.context_length, narrow=narrow)
        for layer in range(config.num_hidden_layers)
    ]
    kept = max(blocks) + 4 * config.hidden_size * len(blocks) if recompute else sum(blocks)
    logits = max(_LOGITS, _LOGIT_ROWS * config.vocab_size) * (4 + narrow) + 4 * config.vocab_size * config.hidden_size
    return Memory(
        weights=4 * parameters // shards,
        gradients=4 * parameters // shards,
        optimizer=optimizer_bytes(recipe, config) // shards,
        gathered=round(gathered),
        copies=round(0 if not bfloat16 else 2 * (block if recompute else parameters)),
        activations=round(tokens * (kept + 12 * config.hidden_size)),
        logits=logits,
    )


def optimizer_bytes(recipe: Recipe, config: TaipanConfig) -> int:
    """Bytes of the moments of the whole model: two fp32 numbers per parameter, one where Muon takes it.

    In 8 bits two bytes and a 16th; the few that are in small parameters, and keep two numbers, are not told apart.
    """
    hidden = 0 if recipe.optimizer.name == "adamw" else hidden_matrix_parameters(config)
    rest = parameter_count(config) - hidden
    return 4 * hidden + (8 * rest if recipe.optimizer.moments == "float32" else 33 * rest // 16)


def hidden_matrix_parameters(config: TaipanConfig) -> int:
    """Parameters that Muon takes: matrices from hidden to hidden."""
    total = 0
    for layer, kind in enumerate(config.layer_types):
        total += sum(matrix.parameters for matrix in table_of(kind).matrices(config) if matrix.hidden)
        if config.has_mlp(layer):
            total += 3 * config.hidden_size * config.intermediate_size
    return total


def shard_count(cluster: Cluster, strategy: Strategy) -> int:
    """Over how many GPUs weights, gradients and moments are spread."""
    if strategy == "fsdp":
        return cluster.gpus
    return min(cluster.gpus, cluster.gpus_per_node) if strategy == "hsdp" else 1


def step_time(
    recipe: Recipe, config: TaipanConfig, cluster: Cluster, strategy: Strategy, *, recompute: bool
) -> StepTime:
    """Time of one optimizer step.

    `ddp` reduces all gradients once a step. Sharding gathers all weights for every forward and for every backward, and
    reduces once a step.
    """
    flops = flops_per_token(config, recipe.data.context_length, training=True) * recipe.tokens_per_step
    flops *= 4 / 3 if recompute else 1.0
    parameters, shards, gpus = parameter_count(config), shard_count(cluster, strategy), cluster.gpus
    gather = 4 * parameters * (shards - 1) / shards
    reduce = gather + 2 * 4 * parameters / shards * (gpus // shards - 1) / max(1, gpus // shards)
    sent = 2 * gather * recipe.training.accumulation + reduce
    return StepTime(flops / (gpus * cluster.flops * cluster.utilisation), sent / cluster.bandwidth)
