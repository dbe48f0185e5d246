"""Other implementations, built only when needed."""

from importlib.util import find_spec
from typing import Any

import torch

from taipan.benchmark.settings import COMPILED
from taipan.config import TaipanConfig
from taipan.errors import ConfigError, how_to_install

NAMES = {"transformers-mamba2": "transformers Mamba-2", "transformers-llama": "transformers Llama"}
"""The values of `against`, and the name of each subject."""


def peer_names(against: str | None) -> list[str]:
    """The subjects of a value of `against`.

    Raises:
        ConfigError: transformers is not installed.
    """
    if against in (None, COMPILED):  # the latter trains only
        return []
    if find_spec("transformers") is None:
        raise ConfigError(f"--against needs transformers, which is not installed: {how_to_install('hf')}.")
    return [subject for name, subject in NAMES.items() if name.startswith(against)]


def build_peer(subject: str, config: TaipanConfig, dtype: torch.dtype) -> Any:
    """The `taipan.hf.peers.Peer` of a name in `NAMES` that is as large as a configuration of ours."""
    from taipan.hf.peers import llama_peer, mamba2_peer

    make = mamba2_peer if subject == NAMES["transformers-mamba2"] else llama_peer
    return make(config, dtype)


def build_peers(against: str | None, config: TaipanConfig, dtype: torch.dtype) -> dict[str, Any]:
    """All subjects of a value of `against`, by name."""
    return {subject: build_peer(subject, config, dtype) for subject in peer_names(against)}
