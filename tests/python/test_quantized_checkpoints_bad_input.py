"""Quantised checkpoints: saves that fail or are refused, folders that are damaged or foreign."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fastq
from fastq.checkpoints import atomic_folder, bitsandbytes, quantization_of
from fastq.checkpoints.shards import bytes_of
from fastq.nn import Int8Linear, OutlierLinear
from fastq.runtime import load_model
from quantized_folders import (
    IDS,
    contents,
    edit_quantization,
    edit_tensors,
    make_quantized,
    read_config,
    save_float,
)

UP = "model.layers.0.mlp.up_proj"  # (96, 64), of llama without a bias


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory) -> Path:
    return save_float(tmp_path_factory.mktemp("float"))


@pytest.fixture
def model(float_folder) -> nn.Module:
    return fastq.quantize(load_model(float_folder))


@pytest.fixture
def folder(tmp_path, model) -> Path:
    """A quantised checkpoint."""
    fastq.save_quantized(model, tmp_path / "int8")
    return tmp_path / "int8"


class TestInterrupted:
    """The old folder stays, and nothing else."""

    @pytest.fixture
    def other(self, float_folder) -> nn.Module:
        return fastq.quantize(load_model(float_folder), "llm_int8")

    @pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()])
    def test_in_the_middle_of_the_shards(self, folder, other, monkeypatch, error):
        import safetensors.torch

        before, written = contents(folder), []

        def save_file(tensors, path, metadata):
            Path(path).write_bytes(b"half")
            written.append(path)
            if len(written) == 2:
                raise error

        monkeypatch.setattr(safetensors.torch, "save_file", save_file)
        with pytest.raises(type(error)):
            fastq.save_quantized(other, folder, max_shard_size="20KB")
        assert len(written) == 2
        assert contents(folder) == before
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    @pytest.mark.parametrize("there", [True, False])
    @pytest.mark.parametrize("step", ["_flush", "_check_replaceable"])
    def test_at_the_end(self, tmp_path, folder, other, monkeypatch, there, step):
        before = contents(folder)
        target = folder if there else tmp_path / "new"
        calls = []

        def fail(path):
            calls.append(path)
            if len(calls) == 2:
                raise OSError("no")

        monkeypatch.setattr(atomic_folder, step, fail)
        with pytest.raises(OSError, match="no"):
            fastq.save_quantized(other, target)
        assert contents(folder) == before
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]

    def test_in_a_layer(self, folder, other, monkeypatch):
        """Layers are read while their shard is written."""
        before, calls = contents(folder), []

        def fail(name, state):
            calls.append(name)
            if len(calls) == 3:
                raise RuntimeError("no")
            return {name: state.weight}

        monkeypatch.setattr(bitsandbytes, "write", fail)
        with pytest.raises(RuntimeError, match="no"):
            fastq.save_quantized(other, folder, max_shard_size=1)
        assert contents(folder) == before
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    @pytest.mark.parametrize("exchange", [True, False])
    def test_replaced(self, folder, other, monkeypatch, exchange):
        if not exchange:
            monkeypatch.setattr(atomic_folder, "_exchange", lambda *_: False)
        before = contents(folder)
        fastq.save_quantized(other, folder)
        assert contents(folder) != before
        assert torch.equal(load_model(folder)(IDS), other(IDS))
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    def test_renames_that_fail(self, folder, other, monkeypatch):
        """Where folders cannot change places, the old one is put back."""
        before, rename = contents(folder), Path.rename

        def fail(path, target):
            if Path(target) == folder and not path.name.endswith(".old"):
                raise OSError("no")
            return rename(path, target)

        monkeypatch.setattr(atomic_folder, "_exchange", lambda *_: False)
        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="no"):
            fastq.save_quantized(other, folder)
        assert contents(folder) == before
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    def test_over_its_own_source(self, tmp_path):
        source = save_float(tmp_path / "model")
        model = fastq.quantize(load_model(source))
        (source / "tokenizer.json").write_text("{}")
        fastq.save_quantized(model, source, source=source)
        assert torch.equal(load_model(source)(IDS), model(IDS))
        assert (source / "tokenizer.json").read_text() == "{}"


class TestSave:
    def test_not_a_module(self, tmp_path):
        with pytest.raises(TypeError, match="model is a str, expected a torch"):
            fastq.save_quantized("model", tmp_path / "int8")

    def test_nothing_quantised(self, tmp_path, float_folder):
        with pytest.raises(ValueError, match="no layer of the model is quantised"):
            fastq.save_quantized(load_model(float_folder), tmp_path / "int8")

    def test_no_config(self, tmp_path):
        model = nn.Sequential(Int8Linear(4, 4))
        with pytest.raises(
            TypeError, match=r"Sequential has no config .* expected one, or a source"
        ):
            fastq.save_quantized(model, tmp_path / "int8")

    def test_two_formats(self, tmp_path, model):
        model.set_submodule(UP, OutlierLinear(64, 96, False))
        with pytest.raises(ValueError, match=r"got llm_int8 with threshold 6 and w8a8$"):
            fastq.save_quantized(model, tmp_path / "int8")

    def test_two_thresholds(self, tmp_path, float_folder):
        model = fastq.quantize(load_model(float_folder), "llm_int8")
        model.get_submodule(UP).threshold = 3.0
        with pytest.raises(ValueError, match=r"threshold 3 and llm_int8 with threshold 6$"):
            fastq.save_quantized(model, tmp_path / "int8")

    def test_rotation(self, tmp_path, float_folder):
        model = fastq.quantize(load_model(float_folder), rotation=16)
        with pytest.raises(NotImplementedError, match=r"q_proj has rotation, .* without"):
            fastq.save_quantized(model, tmp_path / "int8")

    def test_smooth(self, tmp_path, model, float_folder):
        linear = load_model(float_folder).get_submodule(UP)
        smooth = torch.full((64,), 2.0)
        model.set_submodule(UP, Int8Linear.from_float(linear, smooth=smooth))
        with pytest.raises(NotImplementedError, match="up_proj has smooth, for which"):
            fastq.save_quantized(model, tmp_path / "int8")

    def test_kept_columns(self, tmp_path, float_folder):
        model = fastq.quantize(load_model(float_folder), "llm_int8")
        linear = load_model(float_folder).get_submodule(UP)
        options = {"keep_outlier_weights": True, "outlier_columns": [1, 2]}
        model.set_submodule(UP, OutlierLinear.from_float(linear, **options))
        with pytest.raises(NotImplementedError, match="up_proj keeps 2 float columns"):
            fastq.save_quantized(model, tmp_path / "int8")

    def test_conv1d(self, tmp_path):
        model, _ = make_quantized(tmp_path, family="gpt2")
        with pytest.raises(NotImplementedError, match=r"h\.0\.attn\.c_attn is a Conv1D in transf"):
            fastq.save_quantized(model, tmp_path / "int8")

    def test_a_part_of_a_fused_layer(self, tmp_path):
        source = save_float(tmp_path / "float", "bloom")
        model = fastq.quantize(load_model(source), skip=("lm_head", "k_proj"))
        with pytest.raises(ValueError, match=r"expected all .* or none, got .*q_proj, .*v_proj$"):
            fastq.save_quantized(model, tmp_path / "int8")

    def test_fused_layers_of_two_kinds(self, tmp_path):
        model, _ = make_quantized(tmp_path, "w8a8_static", "bloom")
        model.get_submodule("model.layers.1.self_attn.k_proj").input_scale *= 2
        with pytest.raises(ValueError, match="expected the same input_scale, got"):
            fastq.save_quantized(model, tmp_path / "int8")

    def test_source_of_another_model(self, tmp_path, model):
        other = save_float(tmp_path / "float", "opt")
        with pytest.raises(ValueError, match=r"config\.json describes .* expected the model's"):
            fastq.save_quantized(model, tmp_path / "int8", source=other)

    def test_absent_source(self, tmp_path, model):
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            fastq.save_quantized(model, tmp_path / "int8", source=tmp_path / "nowhere")

    def test_absent_parent(self, tmp_path, model):
        with pytest.raises(FileNotFoundError):
            fastq.save_quantized(model, tmp_path / "nowhere" / "int8")

    @pytest.mark.parametrize("name", ["notes.txt", "folder"])
    def test_a_folder_with_something_else(self, folder, model, name):
        if name == "folder":
            (folder / name).mkdir()
        else:
            (folder / name).write_text("mine")
        with pytest.raises(FileExistsError, match=rf"int8: holds {name}; expected a new folder"):
            fastq.save_quantized(model, folder)
        assert (folder / name).exists()

    def test_a_file(self, tmp_path, model):
        (tmp_path / "int8").write_text("mine")
        with pytest.raises(FileExistsError, match="int8: is a file, expected a folder"):
            fastq.save_quantized(model, tmp_path / "int8")

    @pytest.mark.parametrize("size", ["", "GB", "1.5GB", 0, -3, "5 parsecs"])
    def test_shard_size(self, tmp_path, model, size):
        with pytest.raises(ValueError, match=r"max_shard_size is .* expected a number of bytes"):
            fastq.save_quantized(model, tmp_path / "int8", max_shard_size=size)

    def test_shard_sizes(self):
        sizes = [bytes_of(size) for size in (7, "7", "5GB", "200 MiB", "3kb")]
        assert sizes == [7, 7, 5 * 10**9, 200 * 2**20, 3000]

    def test_scale_dtype(self, tmp_path, model):
        with pytest.raises(TypeError, match=r"scale_dtype is torch\.int8, expected one of"):
            fastq.save_quantized(model, tmp_path / "int8", scale_dtype=torch.int8)


class TestLoad:
    @pytest.mark.parametrize("leaf", ["weight", "weight_scale"])
    def test_missing_tensor(self, folder, leaf):
        edit_tensors(folder, lambda t: t.pop(f"{UP}.{leaf}"))
        with pytest.raises(ValueError, match=rf"missing tensor {re.escape(UP)}\.{leaf}; config"):
            load_model(folder)

    def test_missing_input_scale(self, tmp_path):
        model, _ = make_quantized(tmp_path, "w8a8_static")
        fastq.save_quantized(model, tmp_path / "int8")
        edit_tensors(tmp_path / "int8", lambda t: t.pop(f"{UP}.input_scale"))
        with pytest.raises(ValueError, match=rf"missing tensor {re.escape(UP)}\.input_scale"):
            load_model(tmp_path / "int8")

    def test_missing_scb(self, tmp_path):
        model, _ = make_quantized(tmp_path, "llm_int8")
        fastq.save_quantized(model, tmp_path / "int8")
        edit_tensors(tmp_path / "int8", lambda t: t.pop(f"{UP}.SCB"))
        with pytest.raises(ValueError, match=rf"missing tensor {re.escape(UP)}\.SCB"):
            load_model(tmp_path / "int8")

    def test_unexpected_input_scale(self, folder):
        edit_tensors(folder, lambda t: t.update({f"{UP}.input_scale": torch.ones(1)}))
        with pytest.raises(ValueError, match=rf"unexpected tensor {re.escape(UP)}\.input_scale"):
            load_model(folder)

    @pytest.mark.parametrize(
        ("leaf", "tensor", "message"),
        [
            (
                "weight",
                torch.zeros(96, 63, dtype=torch.int8),
                r"shape \(96, 63\), expected \(96, 64\)",
            ),
            ("weight", torch.zeros(96, 64), r"dtype F32, expected one of I8"),
            ("weight_scale", torch.ones(95, 1), r"shape \(95, 1\), expected \(96, 1\) or \(96,\)"),
            ("weight_scale", torch.ones(1), r"shape \(1,\), expected \(96, 1\)"),
            (
                "weight_scale",
                torch.ones(96, 1, dtype=torch.int32),
                r"dtype I32, expected one of BF16",
            ),
            ("weight_scale", torch.zeros(96, 1), "elements that are not positive"),
            ("weight_scale", torch.full((96, 1), torch.nan), "elements that are not positive"),
            ("weight_scale", torch.full((96, 1), torch.inf), "elements that are not positive"),
        ],
    )
    def test_tensor_of_another_kind(self, folder, leaf, tensor, message):
        edit_tensors(folder, lambda t: t.update({f"{UP}.{leaf}": tensor}))
        with pytest.raises(ValueError, match=rf"{re.escape(UP)}\.{leaf} has .*{message}"):
            load_model(folder)

    def test_zero_point(self, folder):
        point = torch.ones(96, 1, dtype=torch.int8)
        edit_tensors(folder, lambda t: t.update({f"{UP}.weight_zero_point": point}))
        with pytest.raises(
            NotImplementedError, match="weight_zero_point is not zero; expected a sym"
        ):
            load_model(folder)

    def test_quantised_where_config_says_float(self, folder):
        edit_quantization(folder, lambda raw: raw["ignore"].append(UP))
        with pytest.raises(ValueError, match=rf"unexpected tensor {re.escape(UP)}\.weight_scale"):
            load_model(folder)

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ({"weights": {"num_bits": 4}}, r"weights: num_bits 4 is not supported; expected 8"),
            ({"weights": {"type": "float"}}, r"weights: type 'float' .* expected 'int'"),
            ({"weights": {"symmetric": False}}, r"weights: symmetric False .* expected True"),
            ({"weights": {"strategy": "group", "group_size": 128}}, r"weights: strategy 'group'"),
            ({"weights": {"strategy": None, "group_size": 32}}, r"weights: strategy 'group'"),
            ({"weights": {"strategy": "block"}}, r"strategy 'block' .* expected 'channel' or 'ten"),
            ({"weights": {"dynamic": True}}, r"weights: dynamic is not supported"),
            ({"weights": None}, r"group_0 has input_activations without weights; expected both"),
            ({"input_activations": None}, r"group_0 has weights without input_activations"),
            ({"input_activations": {"symmetric": False}}, r"input_activations: symmetric False"),
            (
                {"input_activations": {"strategy": "group"}},
                r"'group' .* expected 'token' or 'tensor'",
            ),
            ({"input_activations": {"dynamic": False}}, r"'token' with dynamic False is not supp"),
            ({"input_activations": {"dynamic": "local"}}, r"with dynamic 'local' is not supported"),
            ({"output_activations": {"num_bits": 8}}, r"output_activations is not supported"),
            ({"format": "pack-quantized"}, r"format 'pack-quantized' .* expected 'int-quantized'"),
        ],
    )
    def test_group_that_is_not_w8a8(self, folder, entries, message):
        def edit(raw):
            group = raw["config_groups"]["group_0"]
            for key, value in entries.items():
                old = group[key]
                group[key] = old | value if isinstance(old, dict) and value else value

        edit_quantization(folder, edit)
        with pytest.raises(NotImplementedError, match=rf"config\.json: .*{message}"):
            load_model(folder)

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ({"format": "float-quantized"}, "format 'float-quantized' is not supported"),
            ({"quantization_status": "frozen"}, "quantization_status 'frozen' .* 'compressed'"),
            ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme .* expected none"),
            ({"sparsity_config": {"format": "sparse-bitmask"}}, "sparsity_config 'sparse-bitmask'"),
            (
                {"transform_config": {"config_groups": {"u": {}}}},
                "transform_config .* expected none",
            ),
            ({"config_groups": {"W4A16": ["Linear"]}}, "W4A16 is not supported; expected W8A8"),
            ({"quant_method": "gptq"}, r"already quantised \(gptq\)"),
        ],
    )
    def test_whole_that_is_not_w8a8(self, folder, entries, message):
        def edit(raw):
            raw["config_groups"]["group_0"].pop("format")
            raw.update(entries)

        edit_quantization(folder, edit)
        with pytest.raises(NotImplementedError, match=rf"config\.json: .*{message}"):
            load_model(folder)

    @pytest.mark.parametrize(
        ("groups", "message"),
        [
            ({}, "config_groups {}, expected an object with at least one group"),
            (None, "config_groups None, expected"),
            ({"group_0": 7}, "group_0 is 7, expected an object with a list of targets"),
            ({"group_0": {"targets": "Linear"}}, "expected an object with a list of targets"),
            (
                {"group_0": {"targets": ["Linear"], "weights": 1, "input_activations": 1}},
                "weights is 1",
            ),
        ],
    )
    def test_malformed_groups(self, folder, groups, message):
        edit_quantization(folder, lambda raw: raw.update(config_groups=groups))
        with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
            load_model(folder)

    @pytest.mark.parametrize(
        ("entries", "error", "message"),
        [
            ({"load_in_8bit": False}, NotImplementedError, "without load_in_8bit; expected LLM"),
            ({"llm_int8_has_fp16_weight": True}, NotImplementedError, "llm_int8_has_fp16_weight"),
            ({"llm_int8_threshold": -1.0}, ValueError, "threshold is -1.0, expected 0"),
            ({"llm_int8_threshold": "6"}, TypeError, "threshold is a str, expected a number"),
        ],
    )
    def test_bitsandbytes_config(self, entries, error, message):
        raw = {"quant_method": "bitsandbytes", "load_in_8bit": True} | entries
        with pytest.raises(error, match=f"file: .*{message}"):
            quantization_of({"quantization_config": raw}, "file")

    @pytest.mark.parametrize(
        ("leaf", "tensor", "error", "message"),
        [
            ("SCB", torch.full((96,), -1.0), ValueError, "SCB has elements that are negative"),
            ("SCB", torch.full((96,), torch.nan), ValueError, "SCB has elements that are negative"),
            ("SCB", torch.ones(95), ValueError, r"SCB has shape \(95,\), expected \(96,\)"),
            (
                "weight_format",
                torch.tensor(1, dtype=torch.uint8),
                NotImplementedError,
                r"weight_format is 1, expected 0 \(row\)",
            ),
        ],
    )
    def test_bitsandbytes_tensors(self, tmp_path, float_folder, leaf, tensor, error, message):
        model = fastq.quantize(load_model(float_folder), "llm_int8")
        fastq.save_quantized(model, tmp_path / "int8")
        edit_tensors(tmp_path / "int8", lambda t: t.update({f"{UP}.{leaf}": tensor}))
        with pytest.raises(error, match=message):
            load_model(tmp_path / "int8")

    def test_config_is_not_an_object(self):
        with pytest.raises(ValueError, match="file: quantization_config is 7, expected an object"):
            quantization_of({"quantization_config": 7}, "file")

    def test_no_method(self):
        with pytest.raises(NotImplementedError, match="file: the checkpoint is quantised by None"):
            quantization_of({"quantization_config": {}}, "file")

    def test_conv1d(self, tmp_path, folder):
        gpt2 = save_float(tmp_path / "gpt2", "gpt2")
        raw = read_config(gpt2) | {
            "quantization_config": read_config(folder)["quantization_config"]
        }
        (gpt2 / "config.json").write_text(json.dumps(raw))
        with pytest.raises(
            NotImplementedError, match=r"c_attn is quantised, but a Conv1D in transf"
        ):
            load_model(gpt2)
