"""Trains a small DeepSeek-V4 on text, on whatever this machine has, and writes it in the released format.

    python examples/train.py OUT [--minutes 30] [--text FOLDER] [--device cuda]

All of the architecture learns: window, compressed and heavily compressed attention, hyper-connections, experts chosen
by token and by score. Matrices by Muon, the rest by AdamW, on float32 copies of a bfloat16 model. As in the release,
experts compute with weights rounded to FP4 while their copies learn, and a bias keeps them evenly used. The index is
not trained: a selection has no gradient. At the end all weights are rounded to FP8 and FP4, and
`dsv4 generate OUT --prompt "import os" --raw` continues text with them.

Interrupt it while it trains: what it has learned until then is written.

Sources: DeepSeek-V4 report, 2.4 and 4.2; Muon: K. Jordan et al., 2024; the update's size: Moonlight, 2025.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsv4
from dsv4 import ops
from dsv4.checkpoint import keep_freed, quantize, resolve, save_released
from dsv4.generation import Tokenizer
from dsv4.nn.moe import Router

HELD_OUT = 1 << 15  # tokens
WARM_UP = 0.03  # of the time
BIAS_STEP = 1e-3


def text_tokens(folder: Path, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """The folder's Python sources as tokens: (to learn from, held out)."""
    left_out = {"test", "tests", "site-packages"}
    files = [path for path in sorted(folder.rglob("*.py")) if not left_out & set(path.relative_to(folder).parts)]
    texts = [path.read_text("utf-8", errors="ignore") for path in files]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(texts), generator=generator).tolist()
    tokens = torch.tensor([token for number in order for token in tokenizer.encode(texts[number])])
    if len(tokens) < 4 * HELD_OUT:
        raise SystemExit(f"{folder}: {len(tokens):,} tokens of Python sources are too few; name another --text")
    return tokens[:-HELD_OUT], tokens[-HELD_OUT:]


def orthogonal(update: Tensor) -> Tensor:
    """Near the orthogonal matrix next to each of [n, rows, columns], by Newton-Schulz iterations."""
    x = update.mT if update.shape[1] > update.shape[2] else update
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if update.shape[1] > update.shape[2] else x


def through_fp4(weight: Tensor) -> Tensor:
    return ops.dequantize_fp4(*ops.quantize_fp4(weight), dtype=torch.bfloat16)


class Optimizer:
    """Muon for matrices, AdamW for embedding, head, router, mixing weights and vectors; on float32 copies."""

    def __init__(self, model: nn.Module):
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad and ".indexer." not in n}
        self.copies = {name: p.detach().float().clone() for name, p in self.trained.items()}
        self.first = {name: torch.zeros_like(copy) for name, copy in self.copies.items()}
        self.second = {name: torch.zeros_like(copy) for name, copy in self.copies.items() if not self._is_matrix(name)}
        self.steps = 0

    def _is_matrix(self, name: str) -> bool:
        rows_and_columns = self.copies[name].dim() == 3 or (name.endswith(".weight") and self.copies[name].dim() == 2)
        return rows_and_columns and not name.startswith(("embed", "head")) and ".gate." not in name

    @torch.no_grad()
    def step(self, rate: float) -> None:
        self.steps += 1
        for name, parameter in self.trained.items():
            if parameter.grad is None:
                continue
            grad, copy, first = parameter.grad.float(), self.copies[name], self.first[name]
            if self._is_matrix(name):
                first.mul_(0.95).add_(grad)
                update = orthogonal((grad + 0.95 * first).view(-1, *copy.shape[-2:])).view_as(copy)
                update *= 0.18 * max(copy.shape[-2:]) ** 0.5
            else:
                first.lerp_(grad, 0.1)
                self.second[name].lerp_(grad.square(), 0.05)
                size = (self.second[name] / (1 - 0.95**self.steps)).sqrt_().add_(1e-8)
                update = first / (1 - 0.9**self.steps) / size
            decay = 0.1 if copy.dim() > 1 else 0.0
            copy.mul_(1 - rate * decay).sub_(rate * update)
            parameter.copy_(through_fp4(copy) if ".experts." in name else copy)
            parameter.grad = None


class Balance:
    """Counts how often each expert is chosen, and moves the bias of the choice towards even use."""

    def __init__(self, model: nn.Module):
        self.routers = [module for module in model.modules() if isinstance(module, Router) and module.bias is not None]
        self.counts = {router: torch.zeros_like(router.bias) for router in self.routers}
        for router in self.routers:
            router.register_forward_hook(self._count)

    def _count(self, router: Router, _: tuple, output: tuple[Tensor, Tensor]) -> None:
        self.counts[router] += output[1].flatten().bincount(minlength=len(router.bias))

    @torch.no_grad()
    def step(self) -> None:
        for router, count in self.counts.items():
            router.bias += BIAS_STEP * (count.mean() - count).sign()
            count.zero_()


def rate_at(done: float, peak: float) -> float:
    """The learning rate after a share of the time: a short rise, then a cosine to a tenth."""
    if done < WARM_UP:
        return peak * max(done / WARM_UP, 0.02)
    return peak * (0.55 + 0.45 * math.cos(math.pi * min((done - WARM_UP) / (1 - WARM_UP), 1.0)))


@torch.no_grad()
def held_out_loss(model: dsv4.Transformer, tokens: Tensor, length: int) -> float:
    """Nats a token."""
    rows = tokens[: len(tokens) // (length + 1) * (length + 1)].view(-1, length + 1).to(model.device)
    losses = [F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten()) for part in rows.split(8)]
    return float(torch.stack(losses).mean())


def train(model: dsv4.Transformer, tokens: Tensor, options: argparse.Namespace) -> int:
    """Until the time is up, or it is interrupted; how many tokens it saw."""
    optimizer, balance = Optimizer(model), Balance(model)
    generator = torch.Generator().manual_seed(options.seed)
    begin, seen, average = time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - begin) / (60 * options.minutes)) < 1:
        starts = torch.randint(len(tokens) - options.length - 1, (options.batch, 1), generator=generator)
        rows = tokens[starts + torch.arange(options.length + 1)].to(model.device)
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step(rate_at(done, options.rate))
        balance.step()
        seen += rows[:, 1:].numel()
        average += (loss.item() - average) / min(optimizer.steps, 50)
        if optimizer.steps % 10 == 0:
            speed = seen / (time.monotonic() - begin)
            line = f"step {optimizer.steps}: loss {average:.3f}, {seen:,} tokens, {speed:,.0f} a second, {done:.0%}"
            print(f"\r{line}   ", end="" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write the checkpoint in")
    parser.add_argument("--minutes", type=float, default=30, help="how long to train; default 30")
    parser.add_argument("--text", type=Path, default=Path(sysconfig.get_path("stdlib")), metavar="FOLDER",
                        help="Python sources to learn from; default: those of the standard library")  # fmt: skip
    parser.add_argument("--batch", type=int, default=4, help="sequences a step; default 4")
    parser.add_argument("--length", type=int, default=384, help="tokens of a sequence; default 384")
    parser.add_argument("--rate", type=float, default=6e-3, help="the largest learning rate; default 0.006")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if any(options.out.glob("*.safetensors")):
        parser.error(f"{options.out} holds a checkpoint already; name an empty folder")
    if not options.minutes > 0:
        parser.error(f"--minutes must be above 0, got {options.minutes}")
    keep_freed()
    bundled = resolve("nano")
    tokens, held_out = text_tokens(options.text, Tokenizer(bundled))
    try:  # before the time is spent
        options.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.out).close()
    except OSError as error:
        parser.error(f"{options.out}: {error.strerror}; name another folder")
    config = dsv4.Config.preset("nano")
    model = dsv4.init(config, options.seed, quantization="off", dtype=torch.bfloat16, device=options.device)
    model.note = ""
    before = held_out_loss(model, held_out, options.length)
    print(f"{len(tokens):,} tokens of text; before training {before:.3f} nats a token held out", flush=True)
    try:
        seen = f"{train(model, tokens, options):,} tokens"
    except KeyboardInterrupt:
        seen = "an interrupted run"
    print(f"\nafter {seen}: {held_out_loss(model, held_out, options.length):.3f} nats a token held out")
    model.note = f"learned from {seen} of Python sources: knows how code looks, not what it does"
    rounded = quantize(model)
    print(f"rounded to FP8 and FP4: {held_out_loss(rounded, held_out, options.length):.3f}")
    save_released(rounded, options.out)
    shutil.copy(bundled / "tokenizer.json", options.out)
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
