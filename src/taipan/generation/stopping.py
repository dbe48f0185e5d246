"""Stop strings, watched for in the text of a row as it grows."""

from taipan.data.tokenizer import StreamDecoder, Tokenizer


class StopWatch:
    """Tells when the generated text of one row contains one of some strings.

    It reads whole characters, so a string is found however tokens cut it, inside a token too, and a character whose
    last bytes are still to come is not mistaken for another. Only the end of the text is kept.

    Args:
        strings: at least one, none of them empty.
        tokenizer: decodes the row's tokens.
    """

    def __init__(self, strings: tuple[str, ...], tokenizer: Tokenizer) -> None:
        self._strings = strings
        self._decoder = StreamDecoder(tokenizer)
        self._kept = max(len(text) for text in strings) - 1
        self._tail = ""

    def push(self, token: int) -> bool:
        """Take the row's next token; True when its text completes one of the strings."""
        text = self._tail + self._decoder.push(token)
        self._tail = text[max(0, len(text) - self._kept) :]
        return any(stop in text for stop in self._strings)
