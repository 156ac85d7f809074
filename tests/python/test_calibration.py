"""Calibration: what it sees, how much it keeps, and where its data comes from."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from torch import nn

from decoders import (
    assert_unchanged,
    linear_inputs,
    make_decoder,
    snapshot,
    token_batches,
)
from fastq.demo import corpus
from fastq.nn import OutlierLinear
from fastq.quantization import calibration_batches, progress_bar, quantize
from fastq.quantization.statistics import InputStatistics, input_statistics


class Letters:
    """A tokenizer whose ids are code points."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) for letter in text]


class TestStatistics:
    @pytest.mark.parametrize("head", [False, True])
    def test_layer_by_layer_sees_what_the_whole_model_sees(self, device, head):
        model, batches = make_decoder(device), token_batches(device=device)
        linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        if not head:
            del linears["lm_head"]
        inputs = linear_inputs(model, batches)
        parts = list(input_statistics(model, linears, batches, sample_rows=1000))
        assert [len(part) for part in parts] == [7, 7, 7] + [1] * head
        found = {name: statistics for part in parts for name, statistics in part.items()}
        assert list(found) == list(linears)
        for name, statistics in found.items():
            assert statistics.rows == 3 * 2 * 17
            expected = np.abs(inputs[name].numpy()).max(0)
            np.testing.assert_allclose(statistics.absmax.cpu(), expected, rtol=1e-5)
            torch.testing.assert_close(statistics.sample().cpu(), inputs[name])

    def test_one_layer_at_a_time(self):
        """When the statistics of a layer come, no hook is left, and the layers after it have not
        run."""
        model, batches = make_decoder(), token_batches()
        linears = {n: m for n, m in model.named_modules() if n.endswith("down_proj")}
        ran = []
        model.model.layers[2].register_forward_hook(lambda *_: ran.append(1))
        parts = input_statistics(model, linears, batches)
        for index in range(2):
            assert list(next(parts)) == [f"model.layers.{index}.mlp.down_proj"]
            assert not any(m._forward_pre_hooks for m in model.modules())
            assert not ran
        next(parts)
        assert len(ran) == len(batches)

    @pytest.mark.parametrize("sizes", [[5] * 100, [1] * 333, [500], [3, 200, 1, 77]])
    def test_the_sample_is_bounded_and_spread(self, sizes):
        statistics = InputStatistics("x", 1, 32)
        rows = torch.arange(float(sum(sizes)))[:, None]
        for part in rows.split(sizes):
            statistics.add(part)
        sample = statistics.sample().flatten()
        assert 16 < len(sample) <= 32
        assert sample[0] == 0
        steps = sample.diff()
        assert (steps == steps[0]).all()
        assert len(rows) - 1 - sample[-1] < steps[0]
        assert statistics.absmax == len(rows) - 1

    def test_no_sample_unless_asked(self):
        statistics = InputStatistics("x", 3, 0)
        statistics.add(torch.ones(4, 3))
        assert not statistics._sample

    def test_the_model_comes_back_as_it_was(self):
        model, batches = make_decoder().train(), token_batches()
        model.model.layers[1].eval()
        before = snapshot(model)
        linears = {"model.layers.0.mlp.up_proj": model.model.layers[0].mlp.up_proj}
        list(input_statistics(model, linears, batches))
        assert_unchanged(model, before)
        assert model.training
        assert model.model.layers[0].mlp.training
        assert not model.model.layers[1].training


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor, *, factor: torch.Tensor) -> torch.Tensor:
        return self.down(input=torch.relu(self.up(x)) * factor)


class TestBatches:
    def test_what_a_batch_may_be(self, device):
        """The same numbers as a tensor, a tuple and a dict."""
        x = torch.randn(5, 16)
        torch.manual_seed(0)
        two = TwoInputs()
        one = nn.Sequential(two.up, nn.ReLU(), two.down)
        scales = []
        for batch, model in (
            ([x], one),
            ([(x,)], one),
            ([{"x": x, "factor": torch.ones(1)}], two),
            (iter([x]), one),
            ((y for y in (x[:2], x[2:])), one),
        ):
            copy = (
                type(model)()
                if model is two
                else nn.Sequential(
                    *(type(m)(*s) for m, s in zip(model, ((16, 24), (), (24, 8)), strict=True))
                )
            )
            copy.load_state_dict(model.state_dict())
            quantize(copy.to(device), "w8a8_static", calibration=batch)
            scales.append([m.input_scale.item() for m in copy.modules() if hasattr(m, "scheme")])
        assert len(scales[0]) == 2
        assert all(s == pytest.approx(scales[0]) for s in scales)

    @pytest.mark.parametrize(
        ("calibration", "error", "message"),
        [
            (torch.ones(2, 3), TypeError, "calibration is a Tensor, expected batches"),
            (3, TypeError, "calibration is a int, expected batches"),
            ("stdlib", ValueError, "tokenizer is None, expected one with calibration='stdlib'"),
            ([], ValueError, "q_proj received no input from calibration"),
        ],
        ids=str,
    )
    def test_bad_calibration(self, calibration, error, message):
        model = make_decoder()
        before = snapshot(model)
        with pytest.raises(error, match=message):
            quantize(model, "smoothquant_o1", calibration=calibration)
        assert_unchanged(model, before)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_not_finite(self, bad):
        model = make_decoder()
        model.model.layers[1].mlp.down_proj.weight[0, 0] = bad
        before = snapshot(model)
        message = r"the input of model\.layers\.2\.self_attn\.\w_proj holds a NaN or an Inf"
        with pytest.raises(ValueError, match=message):
            quantize(model, "smoothquant_o3", calibration=token_batches())
        assert all(id(m) == before[0][n] for n, m in model.named_modules())

    def test_a_layer_that_is_not_called(self):
        model = TwoInputs()
        model.spare = nn.Linear(3, 3)
        batch = [{"x": torch.randn(5, 16), "factor": torch.ones(1)}]
        with pytest.raises(ValueError, match="spare received no input from calibration"):
            quantize(model, "w8a8_static", calibration=batch)
        quantize(model, "w8a8_static", ["spare"], calibration=batch)


class TestText:
    def test_pieces_are_spread_over_a_file(self, tmp_path):
        path = tmp_path / "text.txt"
        path.write_text("".join(map(chr, range(32, 632))), encoding="utf-8")
        batches = calibration_batches(path, Letters(), samples=7, length=20, batch_size=3)
        assert [tuple(batch.shape) for batch in batches] == [(3, 20), (3, 20), (1, 20)]
        pieces = torch.cat(batches)
        assert pieces.dtype == torch.int64
        assert (pieces.diff(dim=1) == 1).all()
        assert pieces[0, 0] == 32
        assert pieces[-1, -1] == 631
        gaps = pieces[:, 0].diff()
        assert gaps.min() >= 90
        assert gaps.max() <= 100

    def test_a_short_file(self, tmp_path):
        path = tmp_path / "text.txt"
        path.write_text("hello", encoding="utf-8")
        (batch,) = calibration_batches(str(path), Letters())
        assert batch.tolist() == [[ord(letter) for letter in "hello"]]

    def test_stdlib(self, monkeypatch):
        texts = [(f"{i}.py", chr(97 + i) * 30) for i in range(20)]
        monkeypatch.setattr(corpus, "training_texts", lambda folder: iter(texts))
        batches = calibration_batches("stdlib", Letters(), samples=4, length=25)
        assert torch.equal(
            batches[0], calibration_batches("stdlib", Letters(), samples=4, length=25)[0]
        )
        letters = {chr(i) for i in torch.cat(batches).flatten().tolist()}
        assert len(letters) >= 4  # of files that lie apart

    def test_a_model_by_a_path(self, tmp_path):
        path = tmp_path / "text.txt"
        path.write_text("ABCDEFGH" * 100, encoding="utf-8")
        lengths = []
        model = make_decoder()
        model.model.layers[0].register_forward_pre_hook(
            lambda module, args: lengths.append(args[0].shape[1])
        )
        quantize(model, "smoothquant_o3", calibration=path, tokenizer=Letters())
        assert set(lengths) == {64}  # max_position_embeddings

    @pytest.mark.parametrize(
        ("source", "options", "error", "message"),
        [
            ("no/such.txt", {}, FileNotFoundError, r"calibration: no/such\.txt: no such file"),
            ("empty.txt", {}, ValueError, r"empty\.txt holds 0 tokens, expected 2 or more"),
            ("empty.txt", {"samples": 0}, ValueError, "samples is 0, expected 1 or more"),
            ("empty.txt", {"length": 0}, ValueError, "length is 0, expected 1 or more"),
        ],
    )
    def test_bad_input(self, tmp_path, monkeypatch, source, options, error, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty.txt").touch()
        with pytest.raises(error, match=message):
            calibration_batches(source, Letters(), **options)


class TestProgress:
    def test_decoder(self):
        seen = []
        quantize(
            make_decoder(),
            "smoothquant_o3",
            calibration=token_batches(),
            on_progress=lambda *step: seen.append(step),
        )
        steps = [(done, total) for _, done, total in seen]
        assert steps == [(i, 9) for i in range(1, 10)] + [(i, 21) for i in range(1, 22)]
        assert seen[0][0] == "calibrating layer 1 of 3"

    def test_bar(self, capsys):
        with progress_bar() as on_progress:
            on_progress("calibrating", 1, 2)
            on_progress("calibrating", 2, 0)
        assert capsys.readouterr().out == ""


class TestOutlierColumns:
    def test_found_in_calibration(self, device):
        model, batches = make_decoder(device), token_batches(device=device)
        inputs = linear_inputs(model, batches)
        weights = {
            n: m.weight.clone() for n, m in model.named_modules() if isinstance(m, nn.Linear)
        }
        options = {"keep_outlier_weights": True, "threshold": 2.5}
        quantize(model, "llm_int8", calibration=batches, **options)
        kept = 0
        for name, module in model.named_modules():
            if isinstance(module, OutlierLinear):
                columns = np.flatnonzero(np.abs(inputs[name].numpy()).max(0) >= 2.5)
                assert module.outlier_columns.tolist() == columns.tolist()
                assert torch.equal(module.outlier_weight, weights[name][:, columns])
                kept += len(columns)
        assert kept > 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"scheme": "llm_int8"}, "calibration is None, expected data to keep_outlier_weights"),
            (
                {"scheme": "w8a8"},
                "keep_outlier_weights is given, expected it with scheme='llm_int8'",
            ),
        ],
        ids=str,
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            quantize(make_decoder(), keep_outlier_weights=True, **options)


def test_without_calibration_float_layers_go_one_by_one(monkeypatch):
    """When a layer is quantised, those before it are gone."""
    from fastq.quantization import model as quantize_module

    decoder = make_decoder()
    layers = [weakref.ref(m) for m in decoder.modules() if type(m) is nn.Linear]
    alive = []
    quantize_linear = quantize_module.quantize_linear

    def count(linear, plan):
        alive.append(sum(layer() is not None for layer in layers))
        return quantize_linear(linear, plan)

    monkeypatch.setattr(quantize_module, "quantize_linear", count)
    quantize(decoder)
    assert alive == [22 - i for i in range(21)]
