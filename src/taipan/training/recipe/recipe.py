"""A recipe: everything that decides a training run, from one YAML file and `key=value` overrides."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_type_hints

import yaml

from taipan.config import SETTINGS, TaipanConfig, typed_field
from taipan.errors import ConfigError, DataError, shown, suggestion
from taipan.io import decode_utf8
from taipan.schema import check_keys, check_mapping, convert
from taipan.shipped import model_directory
from taipan.training.recipe.yaml_text import parse_yaml

_Section = TypeVar("_Section")

SLOWEST_IN_INT8 = 0.96
"""The largest `optimizer.betas` with moments in 8 bits. A decay by less than half of the distance of two codes would be
rounded away; they are 2⁻⁴ of a number apart for the first moment, 2⁻⁵ for the root of the second."""


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Which model: a preset with single fields changed, or all fields written out.

    In YAML the overrides stand beside the other keys: `model: {preset: taipan-tiny, hidden_size: 256}`.

    Attributes:
        start: `from` in YAML: a model directory, or the name of a model that comes with the package, whose weights, and
            whose configuration where the recipe has no preset and no layer_types, training starts from.
        preset: a name of `TaipanConfig.presets()`, or None when the overrides are the whole configuration.
        setting: `recommended`, `gumbel` or `paper`; only with a preset.
        overrides: fields of `TaipanConfig`. `vocab_size` and `eos_token_id` come from the data when not given.
    """

    start: str | None = None
    preset: str | None = None
    setting: str = "recommended"
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelSection":
        """From the flat YAML form."""
        hints = get_type_hints(TaipanConfig)
        check_keys(values, ["from", "preset", "setting", *hints], "model")
        overrides: dict[str, Any] = {}
        for key, value in values.items():
            if key not in ("from", "preset", "setting"):
                checked = typed_field(key, value, f"model.{key}")
                overrides[key] = value if key == "time_step_limit" else checked  # its null means "no limit"
        start = convert(values.get("from"), str | None, "model.from")
        preset = convert(values.get("preset"), str | None, "model.preset")
        setting = convert(values.get("setting", "recommended"), str, "model.setting")
        presets = list(TaipanConfig.presets())
        if preset is not None and preset != "paper" and preset not in presets:
            raise ConfigError(
                f"model.preset is {shown(preset)}{suggestion(preset, presets)}, "
                f"but must be one of {', '.join(presets)}, paper."
            )
        if setting not in SETTINGS:
            raise ConfigError(
                f"model.setting is {shown(setting)}{suggestion(setting, list(SETTINGS))}, "
                f"but must be one of {', '.join(SETTINGS)}."
            )
        if preset is None and start is None and not {"hidden_size", "layer_types"} <= set(overrides):
            raise ConfigError(
                "model needs a preset (see `taipan presets`), a model directory to start from (`from`), or at least "
                "hidden_size and layer_types."
            )
        return cls(start=start, preset=preset, setting=setting, overrides=overrides)

    def to_dict(self) -> dict[str, Any]:
        """The flat YAML form."""
        head: dict[str, Any] = {} if self.start is None else {"from": self.start}
        head |= {} if self.preset is None else {"preset": self.preset, "setting": self.setting}
        return {**head, **_plain(self.overrides)}

    def config(self, vocab_size: int, eos_token_id: int | None, *, begun: TaipanConfig | None = None) -> TaipanConfig:
        """The model's configuration for data of this vocabulary.

        Args:
            vocab_size: number of ids of the data's tokenizer.
            eos_token_id: its end-of-document id.
            begun: that of a run that goes on, taken where else the directory to start from would be read: it may have
                been moved or written again since.

        Raises:
            ConfigError: the recipe's vocabulary is smaller than the data's, its end id another, a value impossible, or
                the model to start from has no readable configuration.
        """
        if self.start is not None and self.preset is None and "layer_types" not in self.overrides:
            base = begun or TaipanConfig.from_json_file(model_directory(self.start) / "config.json")
            inherited = {key: value for key, value in base.to_dict().items() if key != "eos_token_id"}
            return dataclasses.replace(self, overrides={**inherited, **self.overrides}).config(vocab_size, eos_token_id)
        given = self.overrides.get("vocab_size")
        if given is not None and given < vocab_size:
            raise ConfigError(
                f"model.vocab_size is {given}, but the data's tokenizer has {vocab_size} ids: "
                "leave model.vocab_size out (it is taken from the data), or prepare the data with a smaller tokenizer."
            )
        end = self.overrides.get("eos_token_id")
        if end is not None and end != eos_token_id:
            raise ConfigError(
                f"model.eos_token_id is {end}, but the data's tokenizer ends a document with {eos_token_id}: "
                "leave model.eos_token_id out (it is taken from the data)."
            )
        fields = {**self.overrides, "vocab_size": given or vocab_size, "eos_token_id": eos_token_id}
        if self.preset is None:
            return TaipanConfig.from_dict(fields)
        return TaipanConfig.preset(self.preset, setting=self.setting, **fields)


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Which prepared data (`taipan data prepare`).

    Attributes:
        train: directory with the training tokens, or several with their weights: `{data/web: 0.7, data/code: 0.3}`.
            Of any number of samples each gives its share, to within one sample.
        valid: directory with held-out tokens of the same tokenizer, or None for no evaluation.
        context_length: T, tokens of a training window.
        packing: `documents` resets every state at document boundaries, before the end token from which the first token
            of the next document is predicted; `concatenate` lets them run on.
        workers: threads that read batches ahead; they change nothing but the time.
    """

    train: str | dict[str, float]
    valid: str | None = None
    context_length: int = 512
    packing: Literal["documents", "concatenate"] = "documents"
    workers: int = 0


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """How a gradient becomes a step; the defaults are the paper's (§4.1).

    Attributes:
        name: `adamw`, or `muon` for the hidden matrices with AdamW for everything else.
        learning_rate: peak rate of AdamW.
        muon_learning_rate: peak rate of Muon.
        weight_decay: decoupled decay, for matrices only (never norms, biases, A_log, D, dt_bias).
        decay_embeddings: whether the embedding (and head) count as such matrices.
        betas, eps: AdamW's.
        moments: what AdamW keeps its two moments in. `int8`: of parameters of 4,096 elements and more a byte each, and
            a scale for each 128 (docs/decisions/0033-moments-in-eight-bits.md); not with sharded parameters.
        clip: largest gradient norm, or None for no clipping; of gates that forecast gains by themselves.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 5e-4
    muon_learning_rate: float = 0.02
    weight_decay: float = 0.01
    decay_embeddings: bool = True
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    moments: Literal["float32", "int8"] = "float32"
    clip: float | None = 1.0


@dataclass(frozen=True, kw_only=True)
class ScheduleSection:
    """How the learning rate moves over training.

    Attributes:
        kind: shape after the warm-up. `wsd` is constant, then linear to `final` over the last `decay` of training: a
            run that is stopped before can be resumed with another length, to fall sooner or later.
        warmup: length of the linear warm-up: below 1 a fraction of training, else a number of steps.
        final: learning rate at the end as a share of the peak (`constant` ignores it).
        decay: the last part of training in which `wsd` falls, as a fraction of it; no other kind reads it.
    """

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup: float = 0.04
    final: float = 0.02
    decay: float = 0.2


@dataclass(frozen=True, kw_only=True)
class TrainingSection:
    """How long, in what portions, and what is written down.

    Attributes:
        steps, seconds, tokens: the length of training; exactly one is given. `seconds` counts the loop's time over all
            resumes, so it ends in time on any machine, but two runs are then not equal.
        batch_size: windows per forward, over all processes.
        accumulation: forwards per optimizer step.
        state_passing: consecutive pieces of `context_length` tokens that a row reads in consecutive steps, each
            starting from the (detached) state the one before left; null: every window starts from an empty state.
        seed: of weights, data order and gate noise.
        dtype: `bfloat16` is autocast over fp32 weights; `auto` takes it where the hardware is fast at it.
        recompute: keep only the residual stream between blocks and compute the rest again in the backward pass: the
            same gradients in less memory, for one forward more. `selective`: only what is quick, Mamba-2's convolution
            and gated norm; also the same gradients.
        compile: run what is plain PyTorch in the blocks through torch.compile; not together with `recompute`.
        implementation: of the ops: `auto`, or the name of one (docs/architecture.md).
        log_every: steps between lines of metrics.jsonl.
        evaluate_every: steps between evaluations, or None: at the end only.
        evaluate_batches: batches of one evaluation.
        sample_every: steps between samples of text, or None for none.
        sample_prompt, sample_tokens: what is continued, and by how many tokens.
        checkpoint_every: steps between checkpoints, or None: when interrupted and at the end only.
        trackers: where metrics go besides metrics.jsonl.
        threads: CPU threads, or None for PyTorch's choice.
        calibrate: set the gates' inference thresholds on training text at the end.
    """

    steps: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    batch_size: int = 16
    accumulation: int = 1
    state_passing: int | None = None
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    recompute: bool | Literal["selective"] = False
    compile: bool = False
    implementation: str = "auto"
    log_every: int = 10
    evaluate_every: int | None = None
    evaluate_batches: int = 8
    sample_every: int | None = None
    sample_prompt: str = "The "
    sample_tokens: int = 64
    checkpoint_every: int | None = None
    threads: int | None = None
    calibrate: bool = True
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()


@dataclass(frozen=True, kw_only=True)
class ParallelSection:
    """How a model is spread over the processes of a run (`torchrun -m taipan train …`); one process ignores it.

    Attributes:
        strategy: `ddp` keeps a whole copy on every process, `fsdp` shards weights, gradients and moments over all of
            them, `hsdp` shards them over groups of `shard_size` and keeps a copy in every group; `auto` chooses by
            memory (`taipan.training.processes.world.strategy_of`).
        shard_size: processes of such a group; null: those of one machine.
    """

    strategy: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    shard_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a training run. `output` is the run directory."""

    model: ModelSection
    data: DataSection
    optimizer: OptimizerSection
    schedule: ScheduleSection
    training: TrainingSection
    parallel: ParallelSection
    output: str

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """From nested plain values, all checked.

        Raises:
            ConfigError: an unknown key at any depth (with a suggestion), a wrong type, a missing or impossible value.
        """
        check_keys(values, [field.name for field in dataclasses.fields(cls)], "")
        for name, why in (
            ("model", "which model to train"),
            ("data", "what to train on"),
            ("output", "where to write"),
        ):
            if values.get(name) is None:
                raise ConfigError(f"The recipe has no {shown(name)}: say {why}.")
        sections = {key: check_mapping(value or {}, key) for key, value in values.items() if key != "output"}
        recipe = cls(
            model=ModelSection.from_dict(sections["model"]),
            data=_section(DataSection, sections["data"], "data"),
            optimizer=_section(OptimizerSection, sections.get("optimizer", {}), "optimizer"),
            schedule=_section(ScheduleSection, sections.get("schedule", {}), "schedule"),
            training=_section(TrainingSection, sections.get("training", {}), "training"),
            parallel=_section(ParallelSection, sections.get("parallel", {}), "parallel"),
            output=convert(values["output"], str, "output"),
        )
        _check_values(recipe)
        return recipe

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
        """Read a YAML file and apply overrides.

        A file may begin with `extends: other.yaml`, a path beside its own: then it holds only what differs from there.

        Args:
            path: the recipe.
            overrides: `section.key=value` texts, the value in YAML; they win over the file.

        Raises:
            ConfigError: the file is missing or no YAML, or `from_dict` refuses the result.
        """
        values = _read_extended(Path(path), ())
        for override in overrides:
            apply_override(values, override)
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values; `from_dict` gives the same recipe again."""
        out: dict[str, Any] = {"model": self.model.to_dict()}
        for name in ("data", "optimizer", "schedule", "training", "parallel"):
            out[name] = _plain(dataclasses.asdict(getattr(self, name)))
        return {**out, "output": self.output}

    def to_yaml(self) -> str:
        """YAML text of `to_dict`."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)

    def resolved(self, config: TaipanConfig) -> "Recipe":
        """The same recipe with every field of the model written out, independent of presets and defaults."""
        return dataclasses.replace(self, model=ModelSection(start=self.model.start, overrides=config.to_dict()))

    @property
    def tokens_per_forward(self) -> int:
        """Tokens of one batch."""
        return self.training.batch_size * self.data.context_length

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step reads."""
        return self.training.accumulation * self.tokens_per_forward

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run; None when its length is given in seconds."""
        if self.training.tokens is not None:
            return max(1, round(self.training.tokens / self.tokens_per_step))
        return self.training.steps


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one dotted key of nested plain values, in place: `training.steps=100`.

    Raises:
        ConfigError: the text is not `key=value`, or the key leads through a plain value.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"The override {shown(override)} is not of the form key=value, for example training.steps=100."
        )
    *sections, last = key.split(".")
    target = values
    for depth, section in enumerate(sections):
        if target.get(section) is None:
            target[section] = {}
        target = check_mapping(target[section], ".".join(sections[: depth + 1]))
    target[last] = parse_yaml(text, f"The value of the override {shown(override)}")


def _no_recipe(path: Path, reader: str, error: OSError) -> str:
    """Why there is no recipe to read at this path, and what to do."""
    if str(path) in TaipanConfig.presets():
        return (
            f"{path} is a preset, not a recipe: a recipe names it as model.preset, and the data to train on. "
            "recipes/tiny.yaml shows how."
        )
    if (path / "recipe.yaml").is_file():
        return f"{path} is a run. Its recipe is {path / 'recipe.yaml'}; `taipan train --resume {path}` continues it."
    if path.is_dir():
        return f"{path}{reader} is a directory; expected a recipe, a YAML file."
    if isinstance(error, FileNotFoundError):
        beside = [entry.name for entry in path.parent.glob("*.yaml")]
        return (
            f"There is no recipe {path}{reader}{suggestion(path.name, beside)}: give the path of a YAML file "
            f"(it is taken from {Path.cwd()})."
        )
    return f"The recipe {path}{reader} cannot be read: {error.strerror or error}."


def _read_extended(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    """The plain values of a recipe file over those of the file it extends, if it does."""
    reader = f" (named by `extends` in {readers[-1]})" if readers else ""
    try:
        text = decode_utf8(path.read_bytes(), f"The recipe {path}{reader}")
    except OSError as error:
        raise ConfigError(_no_recipe(path, reader, error)) from error
    except DataError as error:
        raise ConfigError(str(error)) from error
    if path.resolve() in readers:
        raise ConfigError(f"The recipe {path} extends itself: {' → '.join(map(str, (*readers, path)))}. Remove one.")
    values = check_mapping(parse_yaml(text, f"The recipe {path}") or {}, f"the recipe {path}")
    base = convert(values.pop("extends", None), str | None, f"extends of the recipe {path}")
    if base is None:
        return values
    return _merged(_read_extended(path.parent / base, (*readers, path.resolve())), values)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, section by section."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = {**out[key], **value} if both else value  # a mapping inside a section (data.train) is one value
    return out


def _plain(value: Any) -> Any:
    """Tuples to lists, at any depth: what YAML and JSON can hold."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in cast(dict[str, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast(Sequence[Any], value)]
    return value


def _section(kind: type[_Section], values: dict[str, Any], where: str) -> _Section:
    hints = get_type_hints(kind)
    check_keys(values, list(hints), where)
    for field in dataclasses.fields(cast(Any, kind)):
        if field.default is dataclasses.MISSING and field.name not in values:
            raise ConfigError(f"The recipe has no {where}.{field.name}: it is required.")
    return kind(**{key: convert(value, hints[key], f"{where}.{key}") for key, value in values.items()})


def _check_values(recipe: Recipe) -> None:
    training, optimizer, schedule = recipe.training, recipe.optimizer, recipe.schedule
    lengths = {name: getattr(training, name) for name in ("steps", "seconds", "tokens")}
    given = [name for name, value in lengths.items() if value is not None]
    if len(given) != 1:
        found = " and ".join(f"training.{name}" for name in given) or "none of them"
        raise ConfigError(
            f"Exactly one of training.steps, training.seconds and training.tokens must be given, found {found}. "
            "Set the others to null."
        )
    _require(lengths[given[0]] > 0, f"training.{given[0]}", lengths[given[0]], "above 0")
    for name in ("batch_size", "accumulation", "log_every", "evaluate_batches", "sample_tokens"):
        _require(getattr(training, name) >= 1, f"training.{name}", getattr(training, name), "at least 1")
    for name in ("evaluate_every", "sample_every", "checkpoint_every", "threads"):
        value = getattr(training, name)
        _require(value is None or value >= 1, f"training.{name}", value, "null or at least 1")
    passing = training.state_passing
    _require(passing is None or passing >= 2, "training.state_passing", passing, "null or at least 2 pieces")
    if training.compile and training.recompute:
        raise ConfigError(
            "training.compile and training.recompute are both on, but a recomputed block cannot be compiled around "
            "its ops: switch one of them off."
        )
    name = Path(recipe.output).name.strip()
    own = name not in ("", "..") and "\0" not in recipe.output
    _require(own, "output", recipe.output, "the path of a directory for this run alone, for example runs/first")
    _require(training.seed >= 0, "training.seed", training.seed, "0 or more")
    shard = recipe.parallel.shard_size
    _require(shard is None or shard >= 1, "parallel.shard_size", shard, "null or at least 1")
    _require(recipe.data.context_length >= 2, "data.context_length", recipe.data.context_length, "at least 2")
    _require(recipe.data.workers >= 0, "data.workers", recipe.data.workers, "0 or more")
    for name in ("learning_rate", "muon_learning_rate", "eps"):
        _require(getattr(optimizer, name) > 0, f"optimizer.{name}", getattr(optimizer, name), "above 0")
    _require(optimizer.weight_decay >= 0, "optimizer.weight_decay", optimizer.weight_decay, "0 or more")
    _require(all(0 <= b < 1 for b in optimizer.betas), "optimizer.betas", optimizer.betas, "two numbers, 0 ≤ beta < 1")
    if optimizer.moments == "int8" and max(optimizer.betas) > SLOWEST_IN_INT8:
        raise ConfigError(
            f"optimizer.betas is {shown(list(optimizer.betas))}, but optimizer.moments int8 needs both at most "
            f"{SLOWEST_IN_INT8}: what changes more slowly would stand still in 8 bits. Take float32."
        )
    if optimizer.moments == "int8" and recipe.parallel.strategy in ("fsdp", "hsdp"):
        raise ConfigError(
            f"optimizer.moments is int8, but parallel.strategy {recipe.parallel.strategy} spreads the parameters over "
            "the processes, whose parts have no blocks of their own: take float32, or the strategy ddp."
        )
    _require(optimizer.clip is None or optimizer.clip > 0, "optimizer.clip", optimizer.clip, "null or above 0")
    _require(0 <= schedule.final <= 1, "schedule.final", schedule.final, "a share of the peak between 0 and 1")
    _require(schedule.warmup >= 0, "schedule.warmup", schedule.warmup, "0 or more")
    _require(0 < schedule.decay <= 1, "schedule.decay", schedule.decay, "a fraction of training, above 0 and at most 1")
    steps = recipe.total_steps
    if schedule.warmup >= 1 and steps is None:
        raise ConfigError(
            f"schedule.warmup is {schedule.warmup:g} steps, but with training.seconds the number of steps is not known "
            "beforehand: give the warm-up as a fraction of training, below 1."
        )
    _require(
        steps is None or schedule.warmup < 1 or schedule.warmup <= steps,
        "schedule.warmup",
        schedule.warmup,
        f"at most the {steps} steps of the run, or a fraction below 1",
    )


def _require(ok: bool, name: str, value: Any, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{name} is {shown(value)}, but must be {expected}.")
