"""Text from tokens as they come: whole characters only, and an end at a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .tokenizer import Tokenizer


class TextStream:
    """Decodes one sequence token by token.

    `push` returns the text that has become certain: characters whose bytes are complete, less an
    end that may still turn into a stop string. Once one has come, `stopped` is true, and neither
    the stop string nor what follows it is returned.

    Args:
        tokenizer: of the model.
        stop: strings that end the text.
        prompt: the tokens before, which are not returned but may decide how the first new one
            reads (a leading space).
        skip_special_tokens: leave out tokens such as the end of a text.

    Raises:
        ValueError: an empty stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        prompt: Iterable[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._decode = tokenizer.decode_stream(skip_special_tokens=skip_special_tokens)
        self._stop = tuple(stop)
        if "" in self._stop:
            raise ValueError("generate: stop holds an empty string, expected text")
        self._held = ""
        self.stopped = False
        for token in prompt:
            self._decode(token)

    def push(self, token: int) -> str:
        """The text that this token makes certain; often one word, sometimes nothing."""
        if self.stopped:
            return ""
        text = self._held + self._decode(token)
        ends = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        certain = len(text) - _possible_stop(text, self._stop)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was held back: no more tokens come. Bytes of an unfinished character are lost."""
        held, self._held = self._held, ""
        return held


def _possible_stop(text: str, stop: tuple[str, ...]) -> int:
    """The length of the longest end of the text that begins a stop string."""
    longest = min(len(text), max(map(len, stop), default=1) - 1)
    for length in range(longest, 0, -1):
        if any(string.startswith(text[-length:]) for string in stop):
            return length
    return 0
