"""Processor time of `taipan data prepare`, apart for the process that reads and writes and those that encode.

    python benchmarks/data_preparation.py

The ratio of the two is how many workers one reader keeps busy. The text is the standard library of this Python, twice,
as JSON lines. Figures: docs/data.md.
"""

import json
import resource
from pathlib import Path
from tempfile import TemporaryDirectory

from taipan.data.corpus import Corpus, stdlib_corpus
from taipan.data.preparation import prepare_corpus
from taipan.data.tokenizer import Tokenizer

WORKERS = 2


def seconds(who: int) -> float:
    """Processor time so far of this process, or of all its children that have ended."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def main() -> None:
    train, _ = stdlib_corpus()
    with TemporaryDirectory() as temporary:
        directory = Path(temporary)
        lines = [json.dumps({"text": document.text}) for document in train]
        corpus = directory / "corpus.jsonl"
        corpus.write_text("\n".join(lines * 2), encoding="utf-8")
        size = corpus.stat().st_size / 1e8
        Tokenizer.train_bpe((document.text for document in train[:150]), 4096).save(directory / "bpe")
        for tokenizer in (str(directory / "bpe"), "bytes"):
            before = seconds(resource.RUSAGE_SELF), seconds(resource.RUSAGE_CHILDREN)
            prepare_corpus(Corpus([corpus]), directory / "out", tokenizer=tokenizer, workers=WORKERS)
            reader, encoders = (
                (seconds(who) - begun) / size
                for who, begun in zip((resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN), before, strict=True)
            )
            print(f"{Path(tokenizer).name}: reader {reader:.2f} s, encoding {encoders:.2f} s of processor for 100 MB")


if __name__ == "__main__":
    main()
