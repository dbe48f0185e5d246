"""What `to-gguf` writes, read by llama.cpp itself: its logits are ours, and its greedy text.

Needs llama-cpp-python, which compiles llama.cpp (docs/huggingface.md): `python -m pytest -m llama_cpp`. Measured with
0.3.36, in standard deviations of the logits, root mean square and largest: f32 3e-7 and 3e-6; bf16 2.3e-3 and 1.1e-2,
for there llama.cpp rounds what a matrix is multiplied with to bf16, too; q8_0 1.2e-2 and 4.8e-2.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from taipan.conversion.gguf import to_gguf
from tests.models import random_tokens, small_model

pytestmark = [
    pytest.mark.llama_cpp,
    pytest.mark.skipif(find_spec("llama_cpp") is None, reason="not here: llama_cpp (docs/huggingface.md)"),
]
STACKS: dict[str, dict[str, Any]] = {
    "mamba2": {"n_groups": 2},
    "transformer": {"num_key_value_heads": 2},
    "jamba": {"n_groups": 2, "attention_rope": False},
    "jamba with MLPs and rotary embedding": {"mamba_mlp": True, "attention_rope": True},
}
# of the root mean square and of the largest difference, in standard deviations of the logits: twice what was measured
TOLERANCE = {"f32": (6e-7, 6e-6), "bf16": (5e-3, 2.2e-2), "q8_0": (2.4e-2, 0.1)}


@pytest.fixture(scope="module")
def library() -> Iterator[Any]:
    """The functions of llama.cpp, silent."""
    import llama_cpp

    library: Any = llama_cpp

    @library.llama_log_callback
    def silent(level: int, text: bytes, data: object) -> None:
        pass

    library.llama_log_set(silent, None)
    library.llama_backend_init()
    yield library
    library.llama_log_set(library.llama_log_callback(), None)


def llama_logits(library: Any, file: Path, tokens: list[int]) -> Tensor:
    """Logits after each token, read one by one."""
    model = library.llama_model_load_from_file(str(file).encode(), library.llama_model_default_params())
    settings = library.llama_context_default_params()
    settings.n_ctx = settings.n_batch = 512
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = 0  # keys and values in f32
    settings.flash_attn_type = 0  # else attention is rounded to f16: 1e-4
    context = library.llama_init_from_model(model, settings)
    size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    rows: list[np.ndarray] = []
    for token in tokens:
        batch = library.llama_batch_get_one((library.llama_token * 1)(token), 1)
        assert library.llama_decode(context, batch) == 0
        rows.append(np.ctypeslib.as_array(library.llama_get_logits_ith(context, -1), shape=(size,)).copy())
    library.llama_free(context)
    library.llama_model_free(model)
    return torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", STACKS)
def test_llama_cpp_predicts_what_we_do(name: str, dtype: str, library: Any, tmp_path: Path) -> None:
    """Where it would choose another token, ours was ahead by less than twice the largest difference."""
    sizes = {"hidden_size": 64, "state_size": 16, "mamba_head_dim": 16, "num_attention_heads": 4}
    model = small_model(name.split()[0], dtype=torch.float32, intermediate_size=96, **sizes, **STACKS[name])
    if dtype == "bf16":
        model = model.to(torch.bfloat16).float()
    model.save_pretrained(tmp_path / "model")
    to_gguf(tmp_path / "model", tmp_path / "model.gguf", dtype)
    text = model.generate(random_tokens(1, 40), max_new_tokens=60, do_sample=False, eos_token_id=())
    with torch.inference_mode():
        ours_TV = model(text).logits[0]
    theirs_TV = llama_logits(library, tmp_path / "model.gguf", text[0].tolist())
    difference_TV = (theirs_TV - ours_TV) / ours_TV.std()
    mean, largest = TOLERANCE[dtype]
    assert float(difference_TV.square().mean().sqrt()) < mean
    assert float(difference_TV.abs().max()) < largest
    best_T2 = ours_TV.topk(2).values / ours_TV.std()
    other_T = theirs_TV.argmax(1) != ours_TV.argmax(1)
    assert float((best_T2[:, 0] - best_T2[:, 1])[other_T].sum()) <= 2 * largest * int(other_T.sum())
    if dtype == "f32":
        assert not bool(other_T.any())  # so the greedy text is the same, token by token
