"""The training loop of the scenes VLMs.

Batches are prepared in other processes, the number of steps follows from a deadline, and a killed run resumes.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import DyRateError, InputError
from .data import KINDS, N_CLS, PackedBatches, prefix_ids
from .objective import Recipe, cls_loss, learning_rate, response_loss, to_device, token_accuracy
from .starting import described, load_start
from .tokenizer import build_processor
from .training_keeper import Keeper
from .training_plan import TIMED, Plan, Say
from .training_state import load_state
from .vlm import SIZES, PackedForward, build_model


@dataclass
class TrainResult:
    """``history`` holds one dict per logged step (step, loss, loss by kind, cls, lr, seconds)."""

    model: Any
    processor: Any
    history: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    ms_per_step: float = 0.0
    seconds: float = 0.0
    compiled: bool = False
    recipe: Recipe = field(default_factory=Recipe)  # as it was run


def _loader(dataset: PackedBatches, start: int, workers: int, pin: bool) -> Iterator[dict]:
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

    def __init__(self, recipe: Recipe, device: torch.device, say: Say, start: Path | None) -> None:
        self.recipe, self.device, self.say = recipe, device, say
        self.model = build_model(recipe.size, recipe.seed)
        if start is not None:
            load_start(self.model, start)
        self.model.to(device)
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

    def make_forward(self, compile: bool, lengths: tuple[int, ...], probe: dict, attention: str) -> None:
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        prefix = torch.tensor(prefix_ids())
        self.forward = PackedForward(self.model, prefix, lengths, dtype, attention)
        if not compile:
            return
        started = time.monotonic()
        try:
            self.forward.compile()
            self.losses(probe, warm=True)[0].backward()
            with torch.no_grad():  # validation runs a forward pass of its own: compile that now, too
                self.forward(probe["pixel_values"], probe["ids"])
            self.compiled = True
            self.say(f"compiled both blocks in {time.monotonic() - started:.1f} s")
        except Exception as error:  # whatever the compiler's reason: training goes on without it, and says so
            self.forward = PackedForward(self.model, prefix, lengths, dtype)
            reason = f"{type(error).__name__}: {error}"[:500]
            self.say(f"not compiled, going on in eager mode; the reason: {reason}")
        self.optimizer.zero_grad(set_to_none=True)

    def losses(self, b: dict, warm: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        logits, cls = self.forward(b["pixel_values"], b["ids"])
        main, means = response_loss(logits, b["labels"], b["kind"], self.recipe.kind_weights)
        bag = cls_loss(self.head, cls if warm else cls.detach(), b["cls"], b["seen"])
        total = main + self.recipe.cls_weight * bag
        return total, torch.cat([torch.stack([total, bag]), means]).detach()

    def update(self, b: dict, steps: int) -> torch.Tensor:
        lr = learning_rate(self.recipe, self.step, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # A checkpoint brings no CLS head: a new one learns alone before it may move the tower that it reads.
        warm = self.recipe.start is None or self.step >= min(self.recipe.warmup, steps // 10)
        loss, parts = self.losses(b, warm)
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
        state = load_state(path, self.device)
        want, have = json.dumps(asdict(self.recipe)), json.dumps(state["recipe"])
        if want != have:
            raise InputError(f"{path} belongs to another recipe; remove it or choose another --out.\n{have}\n{want}")
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
    say: Say = print,
    start: Path | None = None,
    attention: str = "masked",
) -> TrainResult:
    """Train a scenes VLM, from scratch or further from a checkpoint.

    Args:
        recipe: what to train; ``steps`` and ``batch`` override its own.
        out: folder of the checkpoint, written every ``save_every`` seconds and at the end; None writes nothing. The
            state to resume from lies beside it in ``<out>.state``.
        device: None takes CUDA if there is one.
        deadline: ``time.monotonic()`` value to be done by; decides the number of steps where the recipe leaves it open.
        compile: None compiles on CUDA only. Where the compiler fails, training goes on in eager mode and says why.
        workers: processes that prepare scenes; None takes up to 10 on CUDA, none on the CPU.
        ship_to: also :func:`ship` every checkpoint there.
        log_every, validate_every: steps between log lines, and between validations (at log lines only).
        say: takes the lines of the progress report.
        start: folder of a checkpoint whose weights training starts from, on pictures that it has not seen; its vocabulary
            may be another one (see `starting`). The optimiser starts afresh. None: from scratch.
        attention: see :class:`PackedForward`.

    Returns:
        The trained model (float32, in eval mode), its processor and the history.

    Raises:
        InputError: if neither steps nor a deadline is given, a state belongs to another recipe, or `start` is no
            checkpoint of this size.
        DyRateError: if the loss stops being finite.
    """
    recipe = replace(recipe, steps=steps or recipe.steps, batch=batch or recipe.batch)
    if start is not None:
        recipe = replace(recipe, start=described(start))
    if recipe.steps is None and deadline is None:
        raise InputError("give a number of steps, or a deadline that decides it")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(torch.cuda.current_device() if device.index is None else device.index)
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)  # flash and memory-efficient kernels serve heads of 32 well
    keeper = Keeper(out, build_processor(), ship_to, save_every, say)
    resumed = keeper.resumable()
    before = recipe.start["pictures"] if recipe.start else 0
    dataset = PackedBatches("train", recipe.batch, recipe.slots, length=10_000_000, seed=recipe.seed, first=before)
    if workers is None:
        workers = max(2, min(10, (os.cpu_count() or 2) // 2 - 2)) if on_gpu else 0
    # Workers are forked before the compiler starts threads of its own.
    loader = _loader(dataset, resumed, workers, on_gpu)
    pending = to_device(next(loader), device)

    run = _Run(recipe, device, say, None if resumed else start)
    plan = Plan(recipe.steps, deadline, resumed, say)
    if resumed:
        state = run.load(_existing(keeper.state))
        plan.steps = plan.steps or state.get("planned")
        say(f"resumed at step {run.step}")
    run.make_forward(on_gpu if compile is None else compile, dataset.layout.lengths, pending, attention)
    validation = PackedBatches("val", min(recipe.batch, 128), recipe.slots, length=4)
    held_out = [to_device(validation[i], device) for i in range(4 if on_gpu else 1)]
    millions = sum(p.numel() for p in run.model.parameters()) / 1e6
    say(
        f"{SIZES[recipe.size].name}: {millions:.2f} M parameters, batch {recipe.batch}, device {device}, "
        f"{workers} workers, rows of {len(prefix_ids())} + {dataset.layout.total} tokens"
    )

    def clock() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.monotonic()

    begun = timed_from = window_from = clock()
    window: list[torch.Tensor] = []
    ms = 0.0
    while not plan.done(run.step):
        window.append(run.update(pending, plan.length))
        if not plan.done(run.step):
            pending = to_device(next(loader), device)
        if run.step == plan.time_from:
            timed_from = clock()
        if run.step == plan.time_to and plan.steps is None:
            now = clock()
            plan.measured(run.step, now, (now - timed_from) * 1000 / (TIMED[1] - TIMED[0]))
        if run.step % log_every and not plan.done(run.step):
            continue
        now = clock()
        ms = (now - window_from) * 1000 / len(window)
        line = _log_line(run, torch.stack(window).mean(0).tolist(), plan.length, now - begun, ms)
        if run.step % validate_every == 0 or (plan.done(run.step) and validate_every <= run.step):
            line["val"] = {k: round(v, 5) for k, v in token_accuracy(run.forward, held_out).items()}
        run.history.append(line)
        say(json.dumps(line))
        if not math.isfinite(line["loss"]):
            raise DyRateError(f"the loss is not finite at step {run.step}; the last checkpoint is kept")
        plan.watch(run.step, now, ms)
        if keeper.due() and not plan.done(run.step):
            keeper.save(run, plan.steps)
        window, window_from = [], clock()
    seconds = clock() - begun
    del loader
    keeper.save(run, plan.steps, final=True)
    run.model.eval()
    return TrainResult(run.model, keeper.processor, run.history, run.step, ms, seconds, run.compiled, recipe)


def _existing(path: Path | None) -> Path:
    assert path is not None
    return path


def _log_line(run: _Run, parts: list[float], length: int, seconds: float, ms: float) -> dict[str, Any]:
    return {
        "step": run.step,
        "loss": round(parts[0], 5),
        "cls": round(parts[1], 5),
        **{k: round(v, 5) for k, v in zip(KINDS, parts[2:-1], strict=True)},
        "grad_norm": round(parts[-1], 4),
        "lr": round(learning_rate(run.recipe, run.step - 1, length), 8),
        "seconds": round(seconds, 2),
        "ms_per_step": round(ms, 2),
    }
