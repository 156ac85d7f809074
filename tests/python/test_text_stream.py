"""Text to tokens and back, whole or as it comes."""

from __future__ import annotations

import pytest

from byte_tokenizer import write_tokenizer
from fastq.runtime import TextStream, Tokenizer, generate, stream_text
from test_generation import make_model


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path)
    return tmp_path


class TestTokenizer:
    @pytest.mark.parametrize("text", ["", "def f(x):\n    return x", "naïve 漢字 🙂\t\r\n  end"])
    def test_round_trip(self, folder, text):
        tokenizer = Tokenizer(folder)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)

    def test_batch(self, folder):
        tokenizer = Tokenizer(folder)
        texts = ["def f", "", "return x + 1"]
        assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]

    def test_special_tokens(self, folder):
        tokenizer = Tokenizer(folder)
        ids = [0, *tokenizer.encode("def")]
        assert tokenizer.decode(ids) == "def"
        assert tokenizer.decode(ids, skip_special_tokens=False) == "<end>def"


class TestTextStream:
    TEXT = "naïve 漢字 🙂 def f(x):\n    return x\n# end"

    def test_pieces_are_whole_characters(self, folder):
        tokenizer = Tokenizer(folder)
        stream = TextStream(tokenizer)
        pieces = [stream.push(token) for token in tokenizer.encode(self.TEXT)]
        assert "".join(pieces) + stream.finish() == self.TEXT
        assert not any("\ufffd" in piece for piece in pieces)
        assert "🙂" in pieces
        assert pieces.count("") == 1 + 2 * 2 + 3  # bytes that complete no character

    def test_the_prompt_is_not_returned(self, folder):
        tokenizer = Tokenizer(folder)
        ids = tokenizer.encode("é漢")
        stream = TextStream(tokenizer, prompt=ids[:3])  # the last character begins in the prompt
        assert "".join(map(stream.push, ids[3:])) == "漢"

    @pytest.mark.parametrize(
        ("stop", "expected"),
        [
            ((), TEXT),
            (("return",), "naïve 漢字 🙂 def f(x):\n    "),
            (("absent", "\n# "), "naïve 漢字 🙂 def f(x):\n    return x"),
            (("x):", "f(x):"), "naïve 漢字 🙂 def "),
            (("# end!",), TEXT),  # never completed: what was held back comes at the end
            (("n",), ""),
        ],
        ids=str,
    )
    def test_stop(self, folder, stop, expected):
        tokenizer = Tokenizer(folder)
        stream = TextStream(tokenizer, stop=stop)
        text = ""
        for token in tokenizer.encode(self.TEXT):
            text += stream.push(token)
            assert expected.startswith(text)
        assert text + stream.finish() == expected
        assert stream.stopped == (expected != self.TEXT)
        assert stream.push(5) == "" or not stream.stopped

    def test_an_empty_stop_string(self, folder):
        with pytest.raises(ValueError, match="stop holds an empty string"):
            TextStream(Tokenizer(folder), stop=[""])

    def test_stream_text(self, folder):
        model, tokenizer = make_model(vocab_size=300), Tokenizer(folder)
        options = {"max_new_tokens": 40, "temperature": 1.0, "seed": 2}
        (whole,) = generate(model, tokenizer.encode("def"), tokenizer=tokenizer, **options)
        pieces = list(stream_text(model, tokenizer, "def", **options))
        assert "".join(pieces) == whole.text
        assert len(pieces) > 5
        assert all(pieces)
        stop = whole.text[12:15]
        (ended,) = generate(
            model, tokenizer.encode("def"), tokenizer=tokenizer, stop=stop, **options
        )
        assert ended.finish_reason == "stop"
        assert ended.text == whole.text[: whole.text.index(stop)]
        assert ended.ids == whole.ids[: len(ended.ids)]
        assert len(ended.ids) < 40
        assert "".join(stream_text(model, tokenizer, "def", stop=stop, **options)) == ended.text
