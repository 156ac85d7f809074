"""Trains the demo's model: a byte-level BPE tokenizer and a small LLaMA on the standard library.

    python -m fastq.demo.train --out DIR        # or: python python/fastq/demo/train.py --out DIR

It needs torch, tokenizers and safetensors, and nothing of fastq's native library, so it also runs
as a plain file from a checkout that was never built. A few minutes on a data-centre GPU; on a CPU
`--steps 20` shows that it works. `--out` receives config.json, model.safetensors (bfloat16),
tokenizer.json and card.json, which records the data, the held-out modules and the perplexities.

The checkpoint kept is the best on a split of the training files. The held-out modules are read
once, at the end, for the card.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __package__:
    from ..evaluation import nats_per_token, windows
    from ..runtime.config import ModelConfig
    from ..runtime.model import CausalLM
    from . import corpus
else:  # run as a file: fastq itself may not be built
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    import corpus
    from evaluation import nats_per_token, windows
    from runtime.config import ModelConfig
    from runtime.model import CausalLM

END_OF_TEXT = "<|endoftext|>"
CONTEXT = 512
DEV_EVERY = 40  # every 40th training file chooses the checkpoint instead of training it


def default_config(vocab_size: int) -> ModelConfig:
    """About 6.9 million parameters: 14 MB in bfloat16."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_ids=(0,),
        dtype="bfloat16",
    )


def train_tokenizer(texts: list[str], vocab_size: int):
    """A byte-level BPE `tokenizers.Tokenizer`; id 0 is the end of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer, texts: list[str]) -> Tensor:
    """All texts as one int64 vector, an end-of-text token before each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        ids.append(end)
        ids.extend(encoding.ids)
    return torch.tensor(ids, dtype=torch.int64)


def initialise(model: CausalLM, seed: int) -> None:
    """Normal(0, 0.02), the layers that write to the residual stream scaled by 1/sqrt(2 layers)."""
    generator = torch.Generator().manual_seed(seed)
    residual = 0.02 / math.sqrt(2 * model.config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                std = residual if "o_proj" in name or "down_proj" in name else 0.02
                parameter.normal_(0.0, std, generator=generator)


def add_dropout(model: CausalLM, rate: float) -> None:
    """Dropout on what each block adds to the residual stream, while training only."""

    def drop(module: nn.Module, _: tuple, output: Tensor) -> Tensor:
        return F.dropout(output, rate, module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=fused)


def batches(tokens: Tensor, batch: int, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (inputs, targets), each (batch, context), at random places of `tokens`."""
    generator = torch.Generator(device=tokens.device).manual_seed(seed)
    span = torch.arange(context + 1, device=tokens.device)
    while True:
        start = torch.randint(
            len(tokens) - context, (batch, 1), generator=generator, device=tokens.device
        )
        block = tokens[start + span]
        yield block[:, :-1], block[:, 1:]


def learning_rate(progress: float, step: int, args: argparse.Namespace) -> float:
    """Linear warm-up over `warmup` steps, then a cosine down to a tenth."""
    warm = min(1.0, (step + 1) / max(1, args.warmup))
    return args.lr * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(
    model: CausalLM, tokens: Tensor, dev: Tensor, args: argparse.Namespace
) -> dict[str, float]:
    """Trains in place, leaves the weights that were best on `dev`, returns the card's figures."""
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    data = batches(tokens, args.batch, min(CONTEXT, len(tokens) - 1), args.seed)
    run = torch.compile(model) if args.compile else model
    device_type = tokens.device.type
    best, best_state, begin = math.inf, None, time.monotonic()
    step, progress = 0, 0.0
    while progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, step, args)
        inputs, targets = next(data)
        model.train()
        with torch.autocast(device_type, torch.bfloat16):
            logits = run(inputs)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        elapsed = time.monotonic() - begin
        # The schedule follows steps or minutes, whichever is further along, so it always anneals.
        progress = max(step / args.steps, elapsed / (60 * args.max_minutes))
        if step % args.eval_every == 0 or progress >= 1.0:
            score = nats_per_token(model, dev, CONTEXT, autocast=torch.bfloat16)
            print(
                f"step {step:6d}  {elapsed:6.1f} s  lr {group['lr']:.2e}  "
                f"train {loss.item():.4f}  dev {score:.4f}  dev perplexity {math.exp(score):.3f}",
                flush=True,
            )
            if score < best:
                best = score
                best_state = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
    model.load_state_dict(best_state)
    return {
        "steps": step,
        "tokens_processed": step * args.batch * CONTEXT,
        "minutes": round((time.monotonic() - begin) / 60, 2),
        "dev_perplexity": round(math.exp(best), 4),
    }


def unigram_nats_per_token(train_tokens: Tensor, tokens: Tensor, vocab_size: int) -> float:
    """What the training frequencies alone give on `tokens` (add-one smoothing)."""
    counts = torch.bincount(train_tokens.cpu(), minlength=vocab_size).double() + 1
    log_probability = (counts / counts.sum()).log()
    _, targets = windows(tokens, CONTEXT)
    return -log_probability[targets[targets >= 0].cpu()].mean().item()


def save(model: CausalLM, tokenizer, card: dict, out: Path) -> None:
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    (out / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")


def held_out_figures(
    model: CausalLM, tokenizer, train_tokens: Tensor, stdlib: Path
) -> dict[str, float | int]:
    """Perplexities on the held-out modules, with the weights rounded to bfloat16."""
    texts = list(corpus.held_out_texts(stdlib).values())
    tokens = encode(tokenizer, texts).to(train_tokens.device)
    predicted = int((windows(tokens, CONTEXT)[1] >= 0).sum())
    nats = nats_per_token(model.to(torch.bfloat16), tokens, CONTEXT)
    unigram = unigram_nats_per_token(train_tokens, tokens, model.config.vocab_size)
    size = sum(len(text.encode()) for text in texts)
    return {
        "held_out_bytes": size,
        "held_out_tokens": predicted,
        "perplexity": round(math.exp(nats), 4),
        "bits_per_byte": round(nats * predicted / math.log(2) / size, 4),
        "unigram_perplexity": round(math.exp(unigram), 2),
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastq.demo.train",
        description="Train the demo's model on the Python standard library's source.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument(
        "--stdlib", type=Path, help="a standard library's folder (default: the running Python's)"
    )
    parser.add_argument("--stdlib-version", help="the Python version that --stdlib comes from")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--max-minutes", type=float, default=math.inf, help="stop annealed by then")
    parser.add_argument("--batch", type=int, default=64, help="sequences of 512 tokens a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--eval-every", type=int, default=500, help="steps")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="train through torch.compile")
    parser.add_argument("--max-files", type=int, help="train on the first files only, for a trial")
    args = parser.parse_args(argv)
    if args.stdlib is not None and args.stdlib_version is None:
        parser.error("--stdlib needs --stdlib-version, which the card records")
    for name in ("steps", "batch", "eval_every", "layers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not args.max_minutes > 0:
        parser.error("--max-minutes must be positive")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    stdlib = args.stdlib or corpus.stdlib_folder()
    version = args.stdlib_version or platform.python_version()
    texts = [text for _, text in corpus.training_texts(stdlib)][: args.max_files]
    if not texts:
        raise SystemExit(f"{stdlib}: no Python source to train on")
    dev_texts = texts[::DEV_EVERY]
    train_texts = [text for i, text in enumerate(texts) if i % DEV_EVERY] or texts
    tokenizer = train_tokenizer(train_texts, args.vocab_size)
    tokens = encode(tokenizer, train_texts).to(args.device)
    dev = encode(tokenizer, dev_texts).to(args.device)
    config = default_config(tokenizer.get_vocab_size())
    config = replace(config, num_hidden_layers=args.layers)
    model = CausalLM(config)
    initialise(model, args.seed)
    add_dropout(model, args.dropout)
    model.to(args.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"Python {version}: {len(texts)} files, {len(tokens)} training tokens, {len(dev)} dev; "
        f"{parameters} parameters on {args.device}",
        flush=True,
    )
    figures = train(model, tokens, dev, args)
    card = {
        "parameters": parameters,
        "python_version": version,
        "files": len(texts),
        "training_tokens": len(tokens),
        **figures,
        "held_out": list(corpus.HELD_OUT),
        **held_out_figures(model, tokenizer, tokens, stdlib),
        "torch_version": str(torch.__version__),
        "device": torch.cuda.get_device_name() if "cuda" in args.device else "cpu",
        "seed": args.seed,
        "licence": "Trained on the source text of the Python standard library (PSF-2.0), "
        "copyright Python Software Foundation and its contributors.",
    }
    save(model, tokenizer, card, args.out)
    print(json.dumps(card, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
