"""Small decoders of the runtime with random weights, for tests of what is done to models."""

from __future__ import annotations

import torch

from fastq.runtime import CausalLM, ModelConfig

VOCABULARY = 101

# One decoder of each kind of block.
BLOCKS = {
    "llama": {},
    "sequential_layer_norm": {
        "norm": "layer",
        "position": "learned",
        "mlp_gated": False,
        "activation": "relu",
        "qkv_bias": True,
        "mlp_bias": True,
    },
    "parallel": {"norm": "layer", "parallel_residual": True, "mlp_gated": False},
    "parallel_shared_norm": {"norm": "layer", "parallel_residual": True, "shared_norm": True},
    "query_key_norms_alibi": {"qk_norm": True, "position": "alibi", "embed_norm": True},
}


def make_decoder(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, **config: object
) -> CausalLM:
    """A LLaMA of three layers with odd sizes, whose norms have gains far from 1."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 40,
        "intermediate_size": 52,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 64,
    }
    model = CausalLM(ModelConfig(**{**sizes, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
                parameter[::13] *= 8
            else:
                parameter.normal_(0, 0.06)
    return model.requires_grad_(False).eval().to(device, dtype)


def token_batches(count: int = 3, device: torch.device | str = "cpu") -> list[torch.Tensor]:
    """Batches of 2 x 17 ids, each another."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (count, 2, 17), generator=generator)
    return list(ids.to(device))


def linear_inputs(model: torch.nn.Module, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs (rows, K) of each linear layer over all batches, float32 on the host."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(
                args[0].detach().flatten(0, -2).float().cpu()
            )
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def snapshot(model: torch.nn.Module) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """What must be the same in a model that nothing happened to: its modules and its values."""
    modules = {name: id(module) for name, module in model.named_modules()}
    return modules, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(
    model: torch.nn.Module, before: tuple[dict[str, int], dict[str, torch.Tensor]]
) -> None:
    modules, state = snapshot(model)
    assert modules == before[0]
    assert state.keys() == before[1].keys()
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in state.items())
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
