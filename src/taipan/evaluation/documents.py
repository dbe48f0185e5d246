"""Documents to evaluate on: token ids, read when needed, and their bytes of text."""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from taipan.data.shards import TokenDataset
from taipan.data.tokenizer import Tokenizer


@runtime_checkable
class Documents(Protocol):
    """Texts as tokens. Ends of documents are not among them."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every document."""
        ...

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of all the texts."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def start_token(self) -> int:
        """The token before the first one of a document: the end-of-document token."""
        ...

    @property
    def token_bytes(self) -> NDArray[np.int64]:
        """Number of bytes of each id of the vocabulary."""
        ...

    def read(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        """The tokens `start` to `stop` (exclusive) of a document."""
        ...


class PreparedDocuments:
    """The documents of a prepared data set, read from disk when needed."""

    def __init__(self, dataset: TokenDataset) -> None:
        self._dataset = dataset
        self.lengths = np.diff(dataset.document_starts) - 1
        self.n_bytes = dataset.n_bytes
        self.vocab_size = dataset.manifest.vocab_size
        self.start_token = dataset.manifest.eos_id
        self.token_bytes = dataset.tokenizer().byte_lengths

    def read(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        """The tokens `start` to `stop` (exclusive) of a document."""
        first = int(self._dataset.document_starts[document])
        return self._dataset.read(first + start, first + stop)


class TextDocuments:
    """Texts in memory, encoded once.

    Args:
        texts: each from its own empty context.
        tokenizer: the model's.
    """

    def __init__(self, texts: Iterable[str], tokenizer: Tokenizer) -> None:
        self.n_bytes = 0
        self._tokens: list[NDArray[np.int64]] = []
        for text in texts:
            self._tokens.append(np.array(tokenizer.encode(text), np.int64))
            self.n_bytes += len(text.encode())
        self.lengths = np.array([len(tokens) for tokens in self._tokens], np.int64)
        self.vocab_size = tokenizer.vocab_size
        self.start_token = tokenizer.eos_id
        self.token_bytes = tokenizer.byte_lengths

    def read(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        """The tokens `start` to `stop` (exclusive) of a document."""
        return self._tokens[document][start:stop]
