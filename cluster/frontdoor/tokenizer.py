"""Text to token ids and back, also token by token.

Byte-level BPE only: every token stands for fixed bytes, so that decoding is concatenation and an
incremental decoder needs no look at earlier tokens.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from workers.errors import CheckpointError


class Tokenizer:
    """A checkpoint's tokenizer; safe to use from several threads."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        if not isinstance(backend.decoder, tokenizers.decoders.ByteLevel):
            raise CheckpointError("tokenizer.json: only the ByteLevel decoder is supported")
        self._backend = backend
        self._byte_of = {char: byte for byte, char in _byte_characters().items()}
        self._bytes: dict[int, bytes] = {}  # of the tokens seen so far
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a `tokenizer.json`.

        Raises:
            CheckpointError: The file cannot be read, or is not byte-level.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
        return cls(backend)

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a text; control tokens written in it count as such."""
        return tuple(self._backend.encode(text).ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def bytes_of(self, token_id: int) -> bytes:
        """Return what a token stands for; empty for an id that the vocabulary leaves unused."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self._backend.id_to_token(token_id) or ""
            try:
                known = bytes(self._byte_of[char] for char in token)
            except KeyError:  # an added token is written as it reads
                known = token.encode()
            self._bytes[token_id] = known
        return known


class Detokenizer:
    """Decodes one sequence token by token, leaving out control tokens.

    What was returned is always the full decode of the tokens so far, up to bytes that may still
    become a character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Return the text that became certain with this token."""
        if token_id in self._tokenizer.special_ids:
            return ""
        return self._decoder.decode(self._tokenizer.bytes_of(token_id))


class StopMatcher:
    """Finds the stop string that a growing text completes first.

    What may still become one is held back.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = stop_strings
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Return the text that is free to go, and the stop string that ends it, if any."""
        self._held += text
        found = [
            (start + len(stop), start, stop)
            for stop in self._stop_strings
            if (start := self._held.find(stop)) >= 0
        ]
        if found:
            _, start, stop = min(found)
            free, self._held = self._held[:start], ""
            return free, stop
        cut = len(self._held) - held_back(self._held, self._stop_strings)
        free, self._held = self._held[:cut], self._held[cut:]
        return free, None

    def flush(self) -> str:
        """Return what was held back: nothing follows that could complete it."""
        free, self._held = self._held, ""
        return free


def held_back(text: str, markers: Sequence[str]) -> int:
    """Return the length of the longest end of the text that begins one of the markers."""
    longest = min(len(text), max(map(len, markers), default=1) - 1)
    for length in range(longest, 0, -1):
        end = text[-length:]
        if any(len(marker) > length and marker.startswith(end) for marker in markers):
            return length
    return 0


@dataclass(frozen=True, slots=True)
class TextPiece:
    """What new tokens became: text, how many of the tokens count, and the stop string that ends."""

    text: str
    num_tokens: int
    stop_string: str | None = None


class TextStream:
    """One sequence's tokens as text: decoded, cut at a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str], min_tokens: int) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._matcher = StopMatcher(stop_strings)
        self._min_tokens = min_tokens
        self.num_tokens = 0

    def push(self, token_ids: Sequence[int], *, stop_token_id: int | None = None) -> TextPiece:
        """Take new tokens; those behind a completed stop string do not count.

        `stop_token_id` is a token that ended the sequence: it counts, but has no text.
        """
        texts = []
        for count, token_id in enumerate(token_ids, 1):
            self.num_tokens += 1
            if token_id == stop_token_id and count == len(token_ids):
                continue
            text = self._detokenizer.push(token_id)
            if self.num_tokens < self._min_tokens:  # no stop of any kind yet
                texts.append(text)
                continue
            free, stop_string = self._matcher.push(text)
            texts.append(free)
            if stop_string is not None:
                return TextPiece("".join(texts), count, stop_string)
        return TextPiece("".join(texts), len(token_ids))

    def finish(self) -> str:
        """Return the text that was held back when the sequence ends without a stop string."""
        return self._matcher.flush()


def _byte_characters() -> dict[int, str]:
    """Return the printable character that byte-level BPE writes for each byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(0x100 + i) for i, byte in enumerate(others)
    }
