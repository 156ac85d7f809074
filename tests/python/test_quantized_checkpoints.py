"""Folders of quantised models: what transformers makes of them, and what comes back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastq
from fastq.nn import Int8Linear
from fastq.runtime import CausalLM, ModelConfig, load_encoder, load_model
from quantized_folders import (
    FAMILIES,
    IDS,
    contents,
    edit_quantization,
    edit_tensors,
    input_scales,
    make_quantized,
    make_transformers_model,
    quantize,
    read_config,
    read_tensors,
    save_float,
)

SCHEMES = ["w8a8", "w8a8_static", "llm_int8"]
SMOOTHED = ["smoothquant_o1", "smoothquant_o2", "smoothquant_o3"]  # the second is w8a8_tensor
# Those whose quantised layers are an nn.Linear in transformers.
LINEAR_FAMILIES = [family for family in FAMILIES if family != "gpt2"]
DOWN = "model.layers.1.mlp.down_proj"


# On compressed-tensors' own range every activation is rounded anew. Where the largest of 64 is 3
# times their root mean square, a rounding is off by 3 / 127 / sqrt(12) of it, and so is a product
# of them; two roundings of the inputs of 14 layers, in squares: sqrt(28) of these.
ROUNDED_ANEW = 0.036


@pytest.fixture
def compressed_tensors():
    pytest.importorskip("transformers", reason="transformers loads the folder")
    return pytest.importorskip("compressed_tensors", reason="transformers needs it to load int8")


def load_in_transformers(folder, **options):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def rms(x):
    return x.float().square().mean().sqrt().item()


def take_fastq_range(monkeypatch) -> None:
    """Makes compressed-tensors quantise activations to -127..127, each token by its own scale.

    It takes one scale for all of (tokens, features), which transformers' OPT gives its MLP.
    """
    from compressed_tensors.quantization.lifecycle import forward
    from compressed_tensors.quantization.utils import helpers

    def scales(value, args, **options):
        if value.dim() != 2:
            return helpers.compute_dynamic_scales_and_zp(value=value, args=args, **options)
        scale, zero = helpers.compute_dynamic_scales_and_zp(value=value[None], args=args, **options)
        return scale[0], zero[0]

    ends = (torch.tensor(-127.0), torch.tensor(127.0))
    for module in (helpers, forward):
        monkeypatch.setattr(module, "calculate_range", lambda *_: ends)
    monkeypatch.setattr(forward, "compute_dynamic_scales_and_zp", scales)


class TestTransformers:
    """Its float path: dequantised weights times activations that are quantised and dequantised."""

    @pytest.mark.parametrize(
        ("family", "scheme"),
        [
            *((family, scheme) for family in LINEAR_FAMILIES for scheme in ("w8a8", "w8a8_static")),
            *(("llama", scheme) for scheme in SMOOTHED),
        ],
    )
    def test_logits(self, tmp_path, compressed_tensors, monkeypatch, family, scheme):
        """compressed-tensors quantises to -128..127 by absmax / 127.5, fastq to -127..127 by
        absmax / 127. On fastq's range both round the same activations to the same integers, and
        what is left is the rounding of float32, near 1e-6, but where an activation lies that close
        to a half: one that is rounded the other way moves its layer's outputs by a step, 1 / 127 of
        the largest input, of one of 64 terms, some 1e-3 of the logits, of later tokens too."""
        model, _ = make_quantized(tmp_path, scheme, family)
        fastq.save_quantized(model, tmp_path / "int8")
        theirs = load_in_transformers(tmp_path / "int8")
        ours = model(IDS)
        assert rms(theirs(IDS).logits - ours) < ROUNDED_ANEW * rms(ours)
        take_fastq_range(monkeypatch)
        error = (theirs(IDS).logits - ours).abs().amax(-1) / ours.abs().max()  # of each token
        assert error.median() < 2e-6
        assert error.max() < 1e-2

    def test_dequantised_weights(self, tmp_path, compressed_tensors):
        from transformers import CompressedTensorsConfig

        model, _ = make_quantized(tmp_path)
        fastq.save_quantized(model, tmp_path / "int8")
        config = CompressedTensorsConfig(dequantize=True)
        theirs = load_in_transformers(tmp_path / "int8", quantization_config=config)
        ours = model.get_submodule(DOWN)
        expected = ours.weight * ours.weight_scale[:, None]
        assert torch.equal(theirs.get_submodule(DOWN).weight, expected)

    def test_bfloat16(self, tmp_path, compressed_tensors):
        """float32 scales are rounded to bfloat16 there, which is little beside INT8's rounding."""
        model, _ = make_quantized(tmp_path, dtype=torch.bfloat16)
        fastq.save_quantized(model, tmp_path / "int8")
        theirs = load_in_transformers(tmp_path / "int8")
        assert theirs.dtype == torch.bfloat16
        assert rms(theirs(IDS).logits - model(IDS)) < ROUNDED_ANEW * rms(model(IDS))

    def test_a_model_of_transformers(self, tmp_path, compressed_tensors):
        model = quantize(make_transformers_model("llama"), "w8a8")
        fastq.save_quantized(model, tmp_path / "int8")
        theirs = load_in_transformers(tmp_path / "int8")(IDS).logits
        ours = model(IDS).logits
        assert rms(theirs - ours) < ROUNDED_ANEW * rms(ours)
        own = load_model(tmp_path / "int8")
        torch.testing.assert_close(own(IDS), ours, rtol=1e-3, atol=1e-3)


class TestRoundTrip:
    @pytest.mark.parametrize("family", LINEAR_FAMILIES)
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_logits_are_bit_equal(self, tmp_path, device, family, scheme):
        model, source = make_quantized(tmp_path, scheme, family)
        fastq.save_quantized(model, tmp_path / "int8", source=source)
        loaded = load_model(tmp_path / "int8", device=device)
        assert {m.weight.device.type for m in loaded.modules() if isinstance(m, Int8Linear)} <= {
            device.type
        }
        assert torch.equal(loaded(IDS.to(device)), model.to(device)(IDS.to(device)))

    @pytest.mark.parametrize("scheme", [*SCHEMES, *SMOOTHED])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_16_bits(self, tmp_path, scheme, dtype):
        model, _ = make_quantized(tmp_path, scheme, dtype=dtype)
        fastq.save_quantized(model, tmp_path / "int8")
        loaded = load_model(tmp_path / "int8")
        assert loaded.dtype == dtype
        assert torch.equal(loaded(IDS), model(IDS))

    def test_shards(self, tmp_path):
        model, _ = make_quantized(tmp_path)
        folder = tmp_path / "int8"
        fastq.save_quantized(model, folder, max_shard_size="20KB")
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
        assert len(files) > 2
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files
        tensors = read_tensors(folder)
        assert index["weight_map"].keys() == tensors.keys()
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        assert index["metadata"]["total_size"] == total
        largest = 103 * 64 * 4  # the embedding, alone in its own
        assert all((folder / file).stat().st_size < largest + 4096 for file in files)
        assert torch.equal(load_model(folder)(IDS), model(IDS))

    def test_some_layers_in_float(self, tmp_path, compressed_tensors):
        source = save_float(tmp_path / "float")
        model = fastq.quantize(load_model(source), skip=("lm_head", "layers.0.mlp", "o_proj"))
        fastq.save_quantized(model, tmp_path / "int8")
        ignored = read_config(tmp_path / "int8")["quantization_config"]["ignore"]
        assert len(ignored) == 1 + 3 + 2
        assert torch.equal(load_model(tmp_path / "int8")(IDS), model(IDS))
        theirs = load_in_transformers(tmp_path / "int8")(IDS).logits
        assert rms(theirs - model(IDS)) < ROUNDED_ANEW * rms(model(IDS))

    def test_two_schemes(self, tmp_path, compressed_tensors):
        model, source = make_quantized(tmp_path, "w8a8_static")
        linear = load_model(source).get_submodule(DOWN)
        model.set_submodule(DOWN, Int8Linear.from_float(linear))
        fastq.save_quantized(model, tmp_path / "int8")
        assert torch.equal(load_model(tmp_path / "int8")(IDS), model(IDS))
        theirs = load_in_transformers(tmp_path / "int8")(IDS).logits
        assert rms(theirs - model(IDS)) < ROUNDED_ANEW * rms(model(IDS))

    def test_tied_head(self, tmp_path):
        model, _ = make_quantized(tmp_path, family="qwen2")
        fastq.save_quantized(model, tmp_path / "int8")
        assert "lm_head.weight" not in read_tensors(tmp_path / "int8")
        loaded = load_model(tmp_path / "int8")
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight

    @pytest.mark.parametrize("family", ["qwen2", "opt"])
    def test_quantised_head_is_not_tied(self, tmp_path, compressed_tensors, family):
        source = save_float(tmp_path / "float", family)
        raw = read_config(source)
        if family == "opt":  # the default there
            assert raw.pop("tie_word_embeddings", True)
        (source / "config.json").write_text(json.dumps(raw))
        model = fastq.quantize(load_model(source), skip=())
        fastq.save_quantized(model, tmp_path / "int8", source=source)
        assert read_config(tmp_path / "int8")["tie_word_embeddings"] is False
        assert torch.equal(load_model(tmp_path / "int8")(IDS), model(IDS))
        theirs = load_in_transformers(tmp_path / "int8")(IDS).logits
        assert rms(theirs - model(IDS)) < ROUNDED_ANEW * rms(model(IDS))

    def test_saved_again(self, tmp_path):
        model, _ = make_quantized(tmp_path)
        fastq.save_quantized(model, tmp_path / "one")
        fastq.save_quantized(
            load_model(tmp_path / "one"), tmp_path / "two", source=tmp_path / "one"
        )
        assert contents(tmp_path / "one") == contents(tmp_path / "two")

    def test_source(self, tmp_path):
        """config.json keeps what the runtime does not know, and the tokenizer comes along."""
        model, source = make_quantized(tmp_path)
        raw = read_config(source) | {"a_new_entry": 7, "torch_dtype": "float32"}
        (source / "config.json").write_text(json.dumps(raw))
        (source / "tokenizer.json").write_text('{"version": "1.0"}')
        (source / "pytorch_model.bin").write_text("no")
        fastq.save_quantized(model, tmp_path / "int8", source=source)
        saved = read_config(tmp_path / "int8")
        del saved["quantization_config"]
        assert saved == raw
        names = contents(tmp_path / "int8").keys()
        assert names == {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
        }


_LOAD = """
import sys
from pathlib import Path
from fastq.runtime import load_model

def status(name):
    text = Path("/proc/self/status").read_text()
    return int(text.partition(name + ":")[2].split()[0]) * 1024

load_model(sys.argv[1])  # what the first use of libraries takes is not the weights'
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of VmRSS
model = load_model(sys.argv[2])
tensors = [*model.parameters(), *model.buffers()]
touched = sum(t.reshape(-1)[::64].sum().item() for t in tensors)  # mapped pages come in
print(sum(t.numel() * t.element_size() for t in tensors), status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_loading_takes_at_most_1_1_times_the_weights(tmp_path):
    config = ModelConfig(
        vocab_size=101,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=20,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        dtype="float32",
    )
    with torch.device("meta"):
        deep = CausalLM(config).requires_grad_(False)
    for parameter in deep.to_empty(device="cpu").parameters():
        parameter.uniform_(-0.1, 0.1)
    fastq.quantize(deep)
    fastq.save_quantized(deep, tmp_path / "deep", max_shard_size="20MB")
    fastq.save_quantized(make_quantized(tmp_path)[0], tmp_path / "small")
    command = [sys.executable, "-c", _LOAD, tmp_path / "small", tmp_path / "deep"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    size, peak = map(int, run.stdout.split())
    assert size > 50e6
    assert 0.9 * size <= peak <= 1.1 * size


def test_encoder(tmp_path, compressed_tensors):
    from transformers import AutoModel, BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 103, "hidden_size": 64, "intermediate_size": 96}
    theirs = BertModel(BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)).eval()
    theirs.save_pretrained(tmp_path / "float")
    encoder = fastq.quantize(load_encoder(tmp_path / "float"))
    fastq.save_quantized(encoder, tmp_path / "int8", source=tmp_path / "float")
    ours = encoder(IDS)
    loaded = load_encoder(tmp_path / "int8")(IDS)
    assert torch.equal(loaded.hidden, ours.hidden)
    assert torch.equal(loaded.pooled, ours.pooled)
    hidden = AutoModel.from_pretrained(tmp_path / "int8")(IDS).last_hidden_state
    assert rms(hidden - ours.hidden) < ROUNDED_ANEW * rms(ours.hidden)


class TestLlmCompressor:
    """Folders as llm-compressor writes them: by compressed-tensors."""

    @staticmethod
    def write(folder, scheme: str, dtype: torch.dtype = torch.float32):
        """A model quantised and saved by compressed-tensors; returns it."""
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
        from compressed_tensors.quantization.utils import calculate_qparams

        model = make_transformers_model("llama", dtype)
        scales = input_scales(model)
        weights = {"num_bits": 8, "type": "int", "strategy": "channel", "dynamic": False}
        inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
        if scheme == "w8a8_static":
            inputs |= {"strategy": "tensor", "dynamic": False}
        if scheme == "per_tensor":
            weights["strategy"] = "tensor"
        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        config = {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}
        apply_quantization_config(model, QuantizationConfig.model_validate(config))
        for name, module in model.named_modules():
            args = getattr(module, "quantization_scheme", None)
            if args is None:
                continue
            axis = 1 if weights["strategy"] == "channel" else (0, 1)
            ends = module.weight.amin(axis, keepdim=True), module.weight.amax(axis, keepdim=True)
            scale, _ = calculate_qparams(*ends, args.weights)
            module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
            if scheme == "w8a8_static":
                module.input_scale.data.fill_(scales[name])
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(folder)
        compressor.update_config(folder)
        return model

    @pytest.mark.parametrize("scheme", ["w8a8", "w8a8_static", "per_tensor"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_loads(self, tmp_path, compressed_tensors, monkeypatch, scheme, dtype):
        self.write(tmp_path, scheme, dtype)
        model = load_model(tmp_path)
        stored = read_tensors(tmp_path)
        linear = model.get_submodule(DOWN)
        assert torch.equal(linear.weight, stored[f"{DOWN}.weight"])
        scale = stored[f"{DOWN}.weight_scale"].float().flatten().expand(64)
        assert torch.equal(linear.weight_scale, scale)
        assert linear.scheme == ("w8a8_static" if scheme == "w8a8_static" else "w8a8")
        assert type(model.lm_head) is torch.nn.Linear
        theirs = load_in_transformers(tmp_path)
        ours = model(IDS)
        assert rms(theirs(IDS).logits - ours) < ROUNDED_ANEW * rms(ours)
        if dtype == torch.float32:
            assert linear.weight.min() == -128  # which fastq itself does not write
            take_fastq_range(monkeypatch)
            error = (theirs(IDS).logits - ours).abs().amax(-1) / ours.abs().max()
            assert error.median() < 2e-6

    @pytest.mark.parametrize("scheme", ["w8a8", "w8a8_static"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_ours_is_the_same(self, tmp_path, compressed_tensors, scheme, dtype):
        """The same entries in config.json, the same tensors, shapes and dtypes."""
        self.write(tmp_path / "theirs", scheme, dtype)
        model = load_model(tmp_path / "theirs")
        fastq.save_quantized(model, tmp_path / "ours", scale_dtype=dtype)
        quantization = [
            read_config(tmp_path / f)["quantization_config"] for f in ("ours", "theirs")
        ]
        for entries in quantization:
            entries.pop("version")
            entries.pop("moe_sparsity_config", None)  # null, and new in 0.20
        assert quantization[0] == quantization[1]
        ours, theirs = read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "theirs")
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name

    @pytest.mark.parametrize("shape", [(64, 1), (64,)])
    def test_shape_of_scales(self, tmp_path, shape):
        model, _ = make_quantized(tmp_path)
        fastq.save_quantized(model, tmp_path / "int8")
        name = f"{DOWN}.weight_scale"
        edit_tensors(tmp_path / "int8", lambda t: t.update({name: t[name].reshape(shape).clone()}))
        assert torch.equal(load_model(tmp_path / "int8")(IDS), model(IDS))

    @pytest.mark.parametrize(
        ("targets", "ignore"),
        [
            (["Linear"], ["re:.*lm_head"]),
            (["re:model[.]layers.*proj$"], []),
            (["re:.*"], ["lm_head"]),
            (["Linear", "re:.*mlp.*"], ["lm_head", "Embedding"]),
        ],
    )
    def test_targets_and_ignore(self, tmp_path, targets, ignore):
        model, _ = make_quantized(tmp_path)
        fastq.save_quantized(model, tmp_path / "int8")

        def edit(raw):
            raw["config_groups"]["group_0"]["targets"] = targets
            raw["ignore"] = ignore

        edit_quantization(tmp_path / "int8", edit)
        assert torch.equal(load_model(tmp_path / "int8")(IDS), model(IDS))

    def test_an_exact_name_comes_first(self, tmp_path):
        """Then a pattern, then a class, whatever their order in the file."""
        model, source = make_quantized(tmp_path, "w8a8_static")
        float_model = load_model(source)
        for layer in (0, 1):
            name = f"model.layers.{layer}.mlp.up_proj"
            linear = float_model.get_submodule(name)
            model.set_submodule(name, Int8Linear.from_float(linear))
        fastq.save_quantized(model, tmp_path / "int8")

        def edit(raw):
            static, dynamic = raw["config_groups"].values()
            static["targets"], dynamic["targets"] = ["Linear"], ["re:.*up_proj"]

        edit_quantization(tmp_path / "int8", edit)
        assert torch.equal(load_model(tmp_path / "int8")(IDS), model(IDS))

    def test_a_preset_and_zero_points(self, tmp_path):
        model, _ = make_quantized(tmp_path)
        fastq.save_quantized(model, tmp_path / "int8")
        edit_quantization(
            tmp_path / "int8", lambda raw: raw.update(config_groups={"W8A8": ["Linear"]})
        )
        zeros = torch.zeros(64, 1, dtype=torch.int8)
        edit_tensors(tmp_path / "int8", lambda t: t.update({f"{DOWN}.weight_zero_point": zeros}))
        assert torch.equal(load_model(tmp_path / "int8")(IDS), model(IDS))
