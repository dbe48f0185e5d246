"""What may not change when a run is resumed, because the curve would be another one."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from taipan.config import TaipanConfig
from taipan.data.mixture import Mixture
from taipan.errors import ConfigError, shown
from taipan.training.recipe import Recipe

_CUTS = ("context_length", "packing", "documents_begin_with")
Identity = dict[str, dict[str, Any]]


def identity(recipe: Recipe, config: TaipanConfig, data: Mixture) -> Identity:
    """Model, data and settings that make the curve of a run; plain values, for the checkpoint."""
    packing = {"packing": recipe.data.packing}
    if recipe.data.packing == "documents":  # runs from before first tokens were trained go on under another loss
        packing["documents_begin_with"] = "the end token"
    optimizer = {"name": recipe.optimizer.name}
    if recipe.optimizer.moments != "float32":  # runs from before there was a choice go on
        optimizer["moments"] = recipe.optimizer.moments
    return {
        "model": config.to_dict(),
        "data": {
            "tokens": [shard.sha256 for manifest in data.manifests for shard in manifest.shards],
            "documents": " ".join(manifest.documents_sha256 for manifest in data.manifests),
            "tokenizer": data.manifests[0].tokenizer_fingerprint,
            "weights": list(data.weights),
            "context_length": recipe.data.context_length,
            **packing,
        },
        "optimizer": optimizer,
        "training": {
            "batch_size": recipe.training.batch_size,
            "accumulation": recipe.training.accumulation,
            "seed": recipe.training.seed,
            "state_passing": recipe.training.state_passing,
        },
    }


def data_fingerprint(identity: Identity) -> str:
    """One hash of the training data: shards, documents and tokenizer, whatever their directory is called."""
    facts = {name: value for name, value in identity["data"].items() if name not in _CUTS}
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def require_same(saved: Identity, given: Identity, checkpoint: Path) -> None:
    """Refuse to resume with a recipe or data other than those of the run.

    A run from before a field of the model was there goes on with the field at its default: it is what the run had.

    Raises:
        ConfigError: naming every change.
    """
    changes: list[str] = []
    for section, old in saved.items():
        new = given[section]
        if section == "model":
            old = TaipanConfig.from_dict(old).to_dict()
        changes += [
            _change(f"{section}.{name}", old.get(name), new.get(name))
            for name in sorted(set(old) | set(new))
            if old.get(name) != new.get(name)
        ]
    if changes:
        raise ConfigError(
            f"The recipe is not the one of {checkpoint}: {'; '.join(changes)}. Resume with the run's own recipe "
            "(name only the run), or start a new run in another output."
        )


def _change(name: str, old: Any, new: Any) -> str:
    if name in ("data.tokens", "data.documents", "data.tokenizer"):
        return f"the {name.removeprefix('data.')} of the training data have changed"
    return f"{name} was {shown(old)} and is now {shown(new)}"
