"""The training loop of the scenes VLMs: batches prepared in other processes, steps planned by a deadline, resumed after a kill."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .checkpoint import export, ship
from .data import KINDS, N_CLS, PackedBatches, prefix_ids
from .objective import Recipe, cls_loss, learning_rate, response_loss, to_device, token_accuracy
from .tokenizer import build_processor
from .vlm import SIZES, PackedForward, build_model


@dataclass
class TrainResult:
    """``history`` holds one dict per logged step (step, loss, loss by kind, cls, lr, seconds)."""

    model: object
    processor: object
    history: list[dict] = field(default_factory=list)
    steps: int = 0
    ms_per_step: float = 0.0
    seconds: float = 0.0
    compiled: bool = False


def _loader(dataset: PackedBatches, start: int, workers: int, pin: bool):
    return iter(
        torch.utils.data.DataLoader(
            dataset,
            batch_size=None,
            sampler=range(start, len(dataset)),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=pin,
        )
    )


class _Run:
    """The moving parts of one training run: forward pass, optimiser, CLS head, log."""

    def __init__(self, recipe: Recipe, device: torch.device, say):
        self.recipe, self.device, self.say = recipe, device, say
        self.model = build_model(recipe.size, recipe.seed).to(device)
        self.head = torch.nn.Linear(SIZES[recipe.size].vision_width, N_CLS).to(device)
        named = [*self.model.named_parameters(), *self.head.named_parameters(prefix="cls_head")]
        decay = [p for n, p in named if p.ndim >= 2 and "embed" not in n]
        plain = [p for n, p in named if not (p.ndim >= 2 and "embed" not in n)]
        self.parameters = [p for _, p in named]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=recipe.lr,
            betas=recipe.betas,
            fused=device.type == "cuda",
        )
        self.step, self.compiled = 0, False
        self.history: list[dict] = []

    def make_forward(self, compile: bool, lengths: tuple[int, ...], probe: dict) -> None:
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        prefix = torch.tensor(prefix_ids())
        self.forward = PackedForward(self.model, prefix, lengths, dtype)
        if not compile:
            return
        started = time.monotonic()
        try:
            self.forward.compile()
            self.losses(probe)[0].backward()
            with torch.no_grad():  # validation runs a forward pass of its own: compile that now, too
                self.forward(probe["pixel_values"], probe["ids"])
            self.compiled = True
            self.say(f"compiled both blocks in {time.monotonic() - started:.1f} s")
        except Exception as error:  # whatever the compiler's reason: training goes on without it, and says so
            self.forward = PackedForward(self.model, prefix, lengths, dtype)
            reason = f"{type(error).__name__}: {error}"[:500]
            self.say(f"not compiled, going on in eager mode; the reason: {reason}")
        self.optimizer.zero_grad(set_to_none=True)

    def losses(self, b: dict) -> tuple[torch.Tensor, torch.Tensor]:
        logits, cls = self.forward(b["pixel_values"], b["ids"])
        main, means = response_loss(logits, b["labels"], b["kind"], self.recipe.kind_weights)
        bag = cls_loss(self.head, cls, b["cls"])
        total = main + self.recipe.cls_weight * bag
        return total, torch.cat([torch.stack([total, bag]), means]).detach()

    def update(self, b: dict, steps: int) -> torch.Tensor:
        lr = learning_rate(self.recipe, self.step, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, parts = self.losses(b)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return torch.cat([parts, norm[None].detach()])

    def state(self) -> dict:
        return dict(
            recipe=asdict(self.recipe),
            step=self.step,
            model=self.model.state_dict(),
            head=self.head.state_dict(),
            optimizer=self.optimizer.state_dict(),
            history=self.history,
        )

    def load(self, path: Path) -> dict:
        state = torch.load(path, map_location=self.device, weights_only=True)
        want, have = json.dumps(asdict(self.recipe)), json.dumps(state["recipe"])
        if want != have:
            raise ValueError(f"{path} belongs to another recipe; remove it or choose another --out.\n{have}\n{want}")
        self.model.load_state_dict(state["model"])
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.history = state["step"], state["history"]
        return state


def train(
    recipe: Recipe,
    *,
    steps: int | None = None,
    batch: int | None = None,
    out: Path | None = None,
    device: torch.device | str | None = None,
    deadline: float | None = None,
    compile: bool | None = None,
    workers: int | None = None,
    save_every: float = 75.0,
    ship_to: Path | None = None,
    log_every: int = 50,
    validate_every: int = 500,
    say=print,
) -> TrainResult:
    """Train a scenes VLM from scratch.

    Args:
        recipe: what to train; ``steps`` and ``batch`` override its own.
        out: folder of the checkpoint, written every ``save_every`` seconds and at the end; None writes nothing. The
            state to resume from lies beside it in ``<out>.state``.
        device: None takes CUDA if there is one.
        deadline: ``time.monotonic()`` value to be done by; decides the number of steps where the recipe leaves it open.
        compile: None compiles on CUDA only. Where the compiler fails, training goes on in eager mode and says why.
        workers: processes that prepare scenes; None takes up to 10 on CUDA, none on the CPU.
        ship_to: also :func:`ship` every checkpoint there.
        say: takes the lines of the progress report.

    Returns:
        The trained model (float32, in eval mode), its processor and the history.

    Raises:
        ValueError: if neither steps nor a deadline is given, or a state belongs to another recipe.
        RuntimeError: if the loss stops being finite.
    """
    changes = {k: v for k, v in (("steps", steps), ("batch", batch)) if v is not None}
    recipe = Recipe(**{**asdict(recipe), **changes, "betas": tuple(recipe.betas), "slots": tuple(recipe.slots)})
    if recipe.steps is None and deadline is None:
        raise ValueError("give a number of steps, or a deadline that decides it")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)  # flash and memory-efficient kernels serve heads of 32 well
    processor = build_processor()
    state_path = None if out is None else out.with_name(out.name + ".state") / "state.pt"
    resume_step = 0
    if state_path is not None and state_path.exists():
        resume_step = torch.load(state_path, map_location="cpu", weights_only=True)["step"]
    dataset = PackedBatches("train", recipe.batch, recipe.slots, length=10_000_000, seed=recipe.seed)
    if workers is None:
        workers = max(2, min(10, (os.cpu_count() or 2) // 2 - 2)) if on_gpu else 0
    # Workers are forked before CUDA and the compiler start threads of their own.
    loader = _loader(dataset, resume_step, workers, on_gpu)
    first = next(loader)
    validation = PackedBatches("val", min(recipe.batch, 128), recipe.slots, length=4)
    n_validation = 4 if on_gpu else 1

    run = _Run(recipe, device, say)
    planned, plans = recipe.steps, []
    if resume_step:
        state = run.load(state_path)
        planned = planned or state.get("planned")
        say(f"resumed at step {run.step}")
    pending = to_device(first, device)
    run.make_forward(on_gpu if compile is None else compile, dataset.layout.lengths, pending)
    held_out = [to_device(validation[i], device) for i in range(n_validation)]
    parameters = sum(p.numel() for p in run.model.parameters())
    say(f"{SIZES[recipe.size].name}: {parameters / 1e6:.2f} M parameters, batch {recipe.batch}, device {device}, "
        f"{workers} workers, rows of {len(prefix_ids())} + {dataset.layout.total} tokens")  # fmt: skip

    def sync() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.monotonic()

    def save(final: bool = False) -> None:
        if out is None:
            return
        state_path.parent.mkdir(parents=True, exist_ok=True)
        partial = state_path.with_suffix(".tmp")
        torch.save(run.state() | {"planned": planned}, partial)
        os.replace(partial, state_path)
        log = "".join(json.dumps(line) + "\n" for line in run.history)
        export(run.model, processor, out, {"log.jsonl": log})
        if ship_to is not None:
            ship(out, ship_to)
        say(f"saved step {run.step} to {out.name}{' (final)' if final else ''}")

    def plan(now: float, ms: float) -> int:
        left = max(0.0, deadline - now) * 0.965 / (ms / 1000)
        total = run.step + int(left)
        return max(run.step + 1, total // 100 * 100 if left >= 200 else total)

    begun, timed_from, last_save = sync(), None, time.monotonic()
    window: list[torch.Tensor] = []
    window_started, window_step = begun, run.step
    measure_at = run.step + 40
    ms = 0.0
    while planned is None or run.step < planned:
        window.append(run.update(pending, planned or 4000))
        more = planned is None or run.step < planned
        pending = to_device(next(loader), device) if more else None
        if run.step == resume_step + 10:
            timed_from = sync()
        if run.step == measure_at and planned is None:
            now = sync()
            ms = (now - timed_from) * 1000 / 30
            planned = plan(now, ms)
            plans.append({"step": run.step, "ms_per_step": round(ms, 2), "steps": planned})
            say(f"{ms:.1f} ms a step: planned {planned} steps")
        if run.step % log_every == 0 or run.step == planned or (run.step == 1 and not on_gpu):
            now = sync()
            parts = torch.stack(window).mean(0).tolist()
            ms = (now - window_started) * 1000 / (run.step - window_step)
            line = {
                "step": run.step,
                "loss": round(parts[0], 5),
                "cls": round(parts[1], 5),
                **{k: round(v, 5) for k, v in zip(KINDS, parts[2:6], strict=True)},
                "grad_norm": round(parts[6], 4),
                "lr": round(learning_rate(recipe, run.step - 1, planned or 4000), 8),
                "seconds": round(now - begun, 2),
                "ms_per_step": round(ms, 2),
            }
            if run.step % validate_every == 0 or run.step == planned:
                scores = token_accuracy(run.forward, held_out)
                line["val"] = {k: round(v, 5) for k, v in scores.items()}
            run.history.append(line)
            say(json.dumps(line))
            if not math.isfinite(parts[0]):
                raise RuntimeError(f"the loss is not finite at step {run.step}; the last checkpoint is kept")
            window, window_started, window_step = [], sync(), run.step
            watch = recipe.steps is None and planned is not None and measure_at + log_every < run.step < planned
            if watch and now + (planned - run.step) * ms / 1000 > deadline + 10:
                planned = min(planned, plan(now, ms))
                plans.append({"step": run.step, "ms_per_step": round(ms, 2), "steps": planned})
                say(f"slower than planned ({ms:.1f} ms a step): now {planned} steps")
            if time.monotonic() - last_save > save_every and run.step != planned:
                save()
                last_save = window_started = time.monotonic()
    seconds = sync() - begun
    del loader
    save(final=True)
    run.model.eval()
    return TrainResult(run.model, processor, run.history, run.step, ms, seconds, run.compiled)
