"""What generation says when memory is short."""

from __future__ import annotations

import pytest
import torch

from fastq.runtime import CausalLM, generate, generate_tokens, memory
from test_generation import CONFIG, make_model


class TestOutOfMemory:
    def message(self, free, batch_size=8, max_length=64, **changed):
        arguments = {"dtype": torch.bfloat16, "kv_cache": None, "device": "cuda:0", **changed}
        return memory.out_of_memory_message(CONFIG, batch_size, max_length, free=free, **arguments)

    def test_cache_bytes(self):
        cache = make_model().new_cache(3, 17)
        actual = cache.keys.nbytes + cache.values.nbytes
        assert memory.cache_bytes(CONFIG, 3, 17, dtype=torch.float32) == actual
        assert memory.cache_bytes(CONFIG, 3, 17, dtype=torch.bfloat16) == actual // 2
        cache = make_model().new_cache(3, 17, dtype=torch.int8)
        tensors = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
        actual = sum(tensor.nbytes for tensor in tensors)
        assert memory.cache_bytes(CONFIG, 3, 17, kv_cache="int8") == actual

    def test_it_says_what_would_fit(self):
        position = memory.cache_bytes(CONFIG, 1, 1, dtype=torch.bfloat16)
        text = self.message(free=5 * 64 * position)
        assert "out of memory on cuda:0" in text
        assert "64.00 KiB for 8 sequences x 64 positions x 2 layers x 2 x 2 heads x 8" in text
        assert "in bfloat16; 40.00 KiB are free" in text
        assert "at most 5 sequences of this length or 40 positions at this batch size" in text
        assert "hold at most 63 positions at this batch size" in self.message(
            free=63 * position, batch_size=1
        )
        assert "do not hold one position of each sequence" in self.message(free=7 * position)
        assert "try a smaller batch" in self.message(free=1 << 30)
        assert self.message(free=None).endswith("in bfloat16")
        assert "in int8" in self.message(free=None, kv_cache="int8")

    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        ],
        ids=["cpu", "cuda"],
    )
    def test_a_failed_allocation(self, monkeypatch, error):
        def fail(*_, **__):
            raise error

        model = make_model()
        monkeypatch.setattr(CausalLM, "new_cache", fail)
        monkeypatch.setattr(memory, "free_bytes", lambda device: 32 << 10)
        with pytest.raises(torch.OutOfMemoryError, match="at most 2 sequences") as caught:
            generate(model, [[1] * 16] * 4, max_new_tokens=48)
        assert caught.value.__cause__ is error

    def test_a_step_that_fails_later(self, monkeypatch):
        model = make_model()
        steps = generate_tokens(model, [1, 2], max_new_tokens=5)
        next(steps)

        def fail(*_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        monkeypatch.setattr(CausalLM, "forward", fail)
        with pytest.raises(torch.OutOfMemoryError, match="generate: out of memory on cpu"):
            next(steps)

    def test_other_errors_stay_what_they_are(self, monkeypatch):
        def fail(*_, **__):
            raise RuntimeError("something else")

        model = make_model()
        monkeypatch.setattr(CausalLM, "new_cache", fail)
        with pytest.raises(RuntimeError, match=r"^something else$"):
            generate(model, [1], max_new_tokens=1)

    def test_free_bytes(self, device):
        assert memory.free_bytes(device) > 1 << 20
