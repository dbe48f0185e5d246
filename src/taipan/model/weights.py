"""The tensors of a model directory: one file, or shards and the index that names them; read, and judged."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from taipan.errors import CheckpointError, brief, shown
from taipan.io import parse_json, parse_json_object, utf8_name
from taipan.native.memory import Arena

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_THRESHOLD = "gate.threshold"
PRECISE = ("A_log", "D", "dt_bias", _THRESHOLD)
"""Tensors that keep their dtype where a model is cast, by the end of their names."""
_READERS = 4  # threads: the first touch of a page takes longer than its copy
_READ = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped.

    Raises:
        CheckpointError: it is missing, damaged or truncated.
    """
    try:
        with utf8_name(path) as name:
            return load_file(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def read_in_large_pages(path: Path) -> dict[str, Tensor]:
    """As `read_safetensors`, but numbers are read into memory side by side, aligned, in large pages; bytes stay mapped.

    Copying what is mapped would take twice as long: each page is then looked up for itself.
    """
    try:
        with utf8_name(path) as name, safe_open(name, framework="pt") as file:  # which checks the header
            with path.open("rb") as raw:
                header = parse_json(raw.read(int.from_bytes(raw.read(8), "little")), str(path), refused=CheckpointError)
                begin = raw.tell()
            kept = {key: value for key, value in header.items() if value.get("dtype") in _READ}
            arena = Arena([(value["shape"], _READ[value["dtype"]]) for value in kept.values()])
            tensors = {key: arena.take(value["shape"], _READ[value["dtype"]]) for key, value in kept.items()}
            places = [(begin + kept[key]["data_offsets"][0], tensor) for key, tensor in tensors.items()]
            with ThreadPoolExecutor(_READERS) as pool:
                list(pool.map(_read, [path] * _READERS, [places[number::_READERS] for number in range(_READERS)]))
            return {key: tensors[key] if key in tensors else file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _read(path: Path, places: Sequence[tuple[int, Tensor]]) -> None:
    """Fill tensors from places of a file."""
    with path.open("rb", buffering=0) as file:
        for place, tensor in places:
            file.seek(place)
            left = memoryview(cast("Any", tensor.flatten().view(torch.uint8).numpy()))
            while left:
                count = file.readinto(left)
                if not count:
                    raise OSError("it is shorter than its header says")
                left = left[count:]


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged or truncated ({brief(error)}): copy it again, or go back to an earlier checkpoint."
    )


def write_weights(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file in which bytes, which stand last, begin at a multiple of 64: kernels read them there."""
    if not any(tensor.dtype == torch.uint8 for tensor in tensors.values()):
        save_file(tensors, path, metadata={"format": "pt"})
        return
    before = sum(tensor.nbytes for tensor in tensors.values() if tensor.dtype != torch.uint8)
    save_file(tensors, path, metadata={"format": "pt", "align": ""})
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    # the header is filled up to a multiple of 8
    save_file(tensors, path, metadata={"format": "pt", "align": "-" * (-(8 + header + before) % 64)})


def weights_file(directory: Path, names: Sequence[str] = (WEIGHTS, INDEX)) -> Path:
    """The file of these names that a directory's weights are read from; of sharded weights their index.

    Raises:
        CheckpointError: there is none.
    """
    path = next((directory / name for name in names if (directory / name).is_file()), None)
    if path is None:
        raise CheckpointError(
            f"{directory} holds no weights: expected {' or '.join(names)} beside config.json. Was the copy complete?"
        )
    return path


def read_weights(
    directory: Path,
    names: Sequence[str] = (WEIGHTS, INDEX),
    read: Callable[[Path], dict[str, Tensor]] = read_safetensors,
) -> tuple[Path, dict[str, Tensor]]:
    """The tensors of a model directory; of sharded weights (`save_pretrained(max_shard_size=…)`) those of all shards.

    Args:
        directory: the model directory.
        names: of the files that may hold weights, the preferred first; one that ends in .json is an index of shards.
        read: reads one file of tensors.

    Returns:
        The file that was read (of sharded weights: its index), for messages; and the tensors by name.

    Raises:
        CheckpointError: there are no weights, or they are damaged, truncated or incomplete.
    """
    path = weights_file(directory, names)
    if path.suffix != ".json":
        return path, read(path)
    tensors: dict[str, Tensor] = {}
    places = _weight_map(path)
    for name in sorted(set(places.values())):
        shard = directory / name
        if not shard.is_file():
            raise CheckpointError(f"{shard} does not exist, but {path} names it: copy the missing shard.")
        held = read(shard)
        odd = sorted(set(held) ^ {key for key, place in places.items() if place == name})
        if odd:
            raise CheckpointError(
                f"{shard} does not hold the tensors that {path} names ({brief(', '.join(odd))}): the files are not of "
                "one model. Copy them again, all together."
            )
        tensors.update(held)
    return path, tensors


def shards(directory: Path) -> set[str]:
    """Names of the index and of the shards in a directory; whoever writes whole weights there removes them."""
    path = directory / INDEX
    return {INDEX, *_weight_map(path).values()} if path.is_file() else set()


def _weight_map(index: Path) -> dict[str, str]:
    """Which shard holds a tensor."""
    try:
        values = parse_json_object(index.read_bytes(), str(index), refused=CheckpointError)
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror or error}.") from error
    places: Any = values.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} has no weight_map: it is damaged, copy it again.")
    for name, shard in cast("dict[str, Any]", places).items():
        # an index is data from elsewhere: it may only name its neighbours
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(
                f"{index} says that {shown(name)} is in {shown(shard)}, but must name a file beside it: copy it again."
            )
    return cast("dict[str, str]", places)


def check_numbers(path: Path, tensors: Mapping[str, Tensor], *, one_dtype: bool = True) -> None:
    """Refuse weights that no forward can compute with: of another type, of several types, or not finite.

    The threshold of a gate may be infinite: such a gate selects every token, or none.

    Args:
        path: the file of the weights, for the message.
        tensors: the weights by name.
        one_dtype: all but those of `PRECISE` must have the same dtype; False where they are about to be cast.

    Raises:
        CheckpointError: naming the tensors.
    """
    names = sorted(tensors)
    odd = [f"{name} is {_name(tensors[name].dtype)}" for name in names if tensors[name].dtype not in _DTYPES]
    if odd:
        raise CheckpointError(
            f"{path} holds numbers that are no weights: {brief(', '.join(odd))}. Expected float32, bfloat16, float16 "
            "or float64: save the model again in one of them."
        )
    plain = [name for name in names if not name.endswith(PRECISE)]
    size: dict[torch.dtype, int] = {}
    for name in plain:
        size[tensors[name].dtype] = size.get(tensors[name].dtype, 0) + tensors[name].numel()
    if one_dtype and len(size) > 1:
        most = max(size, key=lambda dtype: size[dtype])
        odd = [f"{name} is {_name(tensors[name].dtype)}" for name in plain if tensors[name].dtype != most]
        raise CheckpointError(
            f"{path} mixes dtypes: {brief(', '.join(odd))}, the others are {_name(most)}. Load them all in one "
            "(dtype=torch.float32, on the command line --dtype float32), or save the model again."
        )
    odd = [name for name in names if not _is_usable(name, tensors[name])]
    if odd:
        raise CheckpointError(
            f"{path} holds numbers that are not finite in {len(odd)} of its tensors ({brief(', '.join(odd))}): the "
            "model cannot compute anything. Go back to an earlier checkpoint, or copy it again."
        )


def _is_usable(name: str, tensor: Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    if name.endswith(_THRESHOLD):
        return not bool(tensor.isnan().any())
    low, high = tensor.aminmax()  # reads once and makes no copy; a NaN is both
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
