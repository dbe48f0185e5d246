"""What the model writes while it is being trained."""

from typing import Any

import torch

from taipan.data.tokenizer import Tokenizer
from taipan.model import TaipanLM
from taipan.seeding import derive_seed
from taipan.training.step.batch import precision

_TEMPERATURE = 0.8
_TOP_P = 0.95


def sample_text(
    model: TaipanLM, tokenizer: Tokenizer, prompt: str, tokens: int, *, seed: int, dtype: str = "float32"
) -> str:
    """A continuation of the prompt, as at inference; neither the model's mode nor any random state is changed.

    Args:
        model: any.
        tokenizer: its own.
        prompt: what is continued; empty starts a document.
        tokens: how many are written, unless the document ends before.
        seed: equal seeds and weights write equal text.
        dtype: of the forwards, `float32` or `bfloat16`.
    """
    device = next(model.parameters()).device
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    with precision(device, dtype):
        output: Any = model.generate(
            torch.tensor([ids], device=device),
            return_details=True,
            tokenizer=tokenizer,
            max_new_tokens=tokens,
            do_sample=True,
            temperature=_TEMPERATURE,
            top_p=_TOP_P,
            seed=derive_seed(seed, "sample") % (1 << 32),
        )
    written: list[int] = output.sequences[0, len(ids) : len(ids) + int(output.lengths[0])].tolist()
    return tokenizer.decode((token for token in written if token != tokenizer.eos_id), after=ids)
