"""A thin layer over the `tokenizers` library, which reads tokenizer.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path


class Tokenizer:
    """Text to token ids and back, by a Hugging Face folder's tokenizer.json.

    A text has all its tokens and no others: truncation and padding that the file asks for, as those
    of sentence encoders do, are left out.

    Raises FileNotFoundError where the file is absent and ValueError where it is not one.
    """

    def __init__(self, folder: str | Path) -> None:
        import tokenizers  # here: importing fastq must stay light

        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{path}: expected a tokenizer.json, got {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the file's template adds."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: list[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text; texts are tokenised in parallel."""
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode_stream(self, *, skip_special_tokens: bool = True) -> Callable[[int], str]:
        """A function that takes token by token and returns the text that each completes: characters
        of several tokens come whole, with the last of them."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        return lambda token: stream.step(self._tokenizer, token) or ""

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
