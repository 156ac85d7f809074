"""A tokenizer.json that takes any text, trained on the spot."""

from __future__ import annotations

from pathlib import Path


def write_tokenizer(folder: Path) -> int:
    """Writes a byte-level tokenizer of at most 300 tokens, token 0 of them <end>, and returns how
    many there are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["def f(x):\n    return x + 1\n"] * 3,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<end>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()
