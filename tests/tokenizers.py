"""Small trained tokenizers of the kinds that public models have, for text in and out."""

import json
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = ["The taipan waits, strikes, and lets go.", "It waits again; été, 日本語, 🐍.", "waits waits strikes"] * 20


def llama() -> tuple[Tokenizer, str]:
    """BPE with byte fallback, a word's space as ``▁``, and a beginning token that a post-processor adds."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))],
        limit_alphabet=60,
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    whole = json.loads(backend.to_str())
    del whole["added_tokens"][3:]  # the bytes are words like others; the trainer knows no other way to have them
    backend = Tokenizer.from_str(json.dumps(whole))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend, "</s>"


def byte_level() -> tuple[Tokenizer, str]:
    """BPE of bytes, as GPT-2, NeoX and Llama 3 have it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend, "<|endoftext|>"


def unigram() -> tuple[Tokenizer, str]:
    """Unigram with Metaspace, as T5 and XLNet have it."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend, "</s>"


def word_piece() -> tuple[Tokenizer, str]:
    """WordPiece, as BERT has it."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "<eos>"], show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return backend, "<eos>"


BACKENDS: dict[str, Callable[[], Any]] = {
    "Llama": llama,
    "bytes": byte_level,
    "Unigram": unigram,
    "WordPiece": word_piece,
}
