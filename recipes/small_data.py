"""The data of taipan-small: an encyclopaedia, books, code and retrieval tasks, with one tokenizer of 4,096 tokens.

    python recipes/small_data.py enwik8.gz books.jsonl.gz code.jsonl.gz --out data

Of enwik8's standard split 90/5/5 MB the first part is trained on, and 1 MB of the second held out (`dev`); the third is
never touched. Books and code are JSON lines with a document in the field `text` of each. Same files, same data.
"""

import argparse
import gzip
import json
import tempfile
from pathlib import Path

from taipan.data.corpus import Corpus
from taipan.data.preparation import prepare_corpus
from taipan.data.shards import TokenDataset
from taipan.experiments.retrieval import prepare_tasks

VOCABULARY, TRAIN, VALID = 4096, 90_000_000, 91_000_000
TASKS = 5_000_000


def sample(enwik8: str, books: Path, code: Path) -> list[str]:
    """What the tokenizer is trained on: 12 MB, the beginnings of all books, and every second file of code."""
    size = len(enwik8)
    starts = [enwik8.find("\n", number * size // 12) + 1 for number in range(12)]
    texts = [enwik8[start : start + 1_000_000] for start in starts]
    texts += [text[:170_000] for text in lines(books)]
    return texts + [text for number, text in enumerate(lines(code)) if number % 2 == 0]


def lines(path: Path) -> list[str]:
    """The texts of a JSON-lines file, empty ones too."""
    return [json.loads(line)["text"] for line in unpacked(path).splitlines()]


def unpacked(path: Path) -> bytes:
    """What is in a file, perhaps compressed with gzip."""
    content = path.read_bytes()
    return gzip.decompress(content) if path.suffix == ".gz" else content


def main() -> None:
    """Make `enwik8`, `books`, `code`, `tasks` and `dev` under --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("enwik8", "books", "code"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--out", type=Path, default=Path("data"))
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    wiki = unpacked(given.enwik8)[:VALID]
    train = wiki[: wiki.rfind(b"\n", 0, TRAIN) + 1]
    dev = wiki[wiki.find(b"\n", TRAIN) + 1 : wiki.rfind(b"\n", 0, VALID) + 1]
    with tempfile.TemporaryDirectory() as directory:
        own = {"enwik8": Path(directory) / "enwik8-train.txt", "dev": Path(directory) / "enwik8-dev.txt"}
        own["enwik8"].write_bytes(train)
        own["dev"].write_bytes(dev)
        texts = Path(directory) / "sample.jsonl"
        told = (json.dumps({"text": text}) for text in sample(train.decode(), given.books, given.code))
        texts.write_text("\n".join(told) + "\n", encoding="utf-8")
        (first,) = prepare_corpus(
            Corpus([texts]), Path(directory) / "sample", tokenizer=f"bpe:{VOCABULARY}", workers=given.workers
        )
        files = {**own, "books": given.books, "code": given.code}
        for name, path in files.items():
            out = given.out / name
            prepare_corpus(Corpus([path]), out, tokenizer=str(first.path), workers=given.workers)
            print(f"{out}: {TokenDataset.open(out).n_tokens:,} tokens", flush=True)
    made = prepare_tasks(
        [TokenDataset.open(given.out / name) for name in ("enwik8", "books", "code")],
        given.out / "tasks",
        tokens=TASKS,
    )
    print(f"{made.path}: {made.n_tokens:,} tokens")


if __name__ == "__main__":
    main()
