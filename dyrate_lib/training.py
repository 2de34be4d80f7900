"""Training the rate predictor: teacher forcing, straight-through Gumbel-softmax, cross-entropy plus a FLOPs term.

The VLM is frozen; only the predictor learns. Since layers < P see every token, the attention shares v_t of all steps
come from one unpruned pass and do not depend on the rates drawn, so one forward pass trains all steps of a response.

Under `torchrun` or `accelerate launch` (`distributed`) every batch is shared by row among the processes: the same rows, draws
and loss as with one, so the predictor is the same to float rounding, whatever their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import distributed, masks
from .errors import InputError, check_whole
from .loading import prepare_inputs
from .models import Adapter, model_info
from .predictor import RatePredictor
from .predictor_inputs import BY_NUMBER
from .prompts import chat_prompt
from .teacher_forcing import TeacherForced, masked_logits, read_prompt_and_response
from .training_budget import ETA, FlopsRatio, Lagrangian, Lengths, Penalty, fit_bias, flops_table, hard_distribution
from .training_checks import check_controls, check_references, check_settings, warn_if_out_of_reach
from .training_features import FeatureReader, check_annotated, fill_bank

_SCALING_BATCHES = 8  # batches whose features set the scale of the classifier's inputs


@dataclass
class TrainResult:
    """A trained predictor and its history: a list of dicts (step, loss, ce, flops_ratio, hard_ratio, tau; of a Lagrangian mu)."""

    predictor: RatePredictor
    history: list[dict[str, float]] = field(default_factory=list)


def encode_responses(tokenizer: Any, texts: Sequence[str], limit: int, device: Any) -> tuple[Tensor, list[int]]:
    """Responses as right-padded ids with EOS: ([B, R] int64, lengths)."""
    rows = []
    for text in texts:
        ids = tokenizer(" " + text.strip(), add_special_tokens=False)["input_ids"]
        rows.append([*ids, tokenizer.eos_token_id][:limit])
    longest = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    padded = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
    return padded, [len(row) for row in rows]


def _batches(dataset: Any, batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    if len(dataset) == 0:
        raise InputError("The training set is empty.")
    size = min(batch_size, len(dataset))
    while True:
        order = torch.randperm(len(dataset), generator=generator).tolist()
        yield from (order[i : i + size] for i in range(0, len(order) - size + 1, size))


def _inputs(model: Any, processor: Any, dataset: Any, indices: list[int], items: list[Any], device: Any) -> dict:
    """One batch of prompts; pictures of a `CaptionDataset` are made once and kept (a sweep sees them hundreds of times)."""
    from .datasets import CaptionDataset
    from .evaluate import batches

    if isinstance(dataset, CaptionDataset):
        return next(batches(model, processor, dataset, indices, len(indices)))[1]
    return prepare_inputs(
        processor, [item.image for item in items], [chat_prompt(item.prompt) for item in items], device
    )


def train_predictor(
    model: Any,
    processor: Any,
    dataset: Any,
    *,
    target: float = 0.333,
    convention: str = "paper",
    layer: int = 3,
    n_rates: int = 10,
    steps: int = 300,
    batch_size: int = 16,
    lr: float = 0.02,
    lam: float = 200.0,
    tau: tuple[float, float] = (2.0, 0.1),
    seed: int = 0,
    max_new_tokens: int = 64,
    inputs: str = "shares",
    constraint: str = "penalty",
    eta: float = ETA,
    reversible: bool = False,
    progress: bool = True,
    callback: Callable[[int, dict[str, float]], None] | None = None,
) -> TrainResult:
    """Train a `RatePredictor` on a frozen VLM. Deterministic by `seed` on one device; processes of one launch share the work.

    dataset: items with `image`, `prompt` (user text) and `references`; one reference is drawn at random each time.
    target: the FLOPs ratio to reach, in `convention` ("paper", "paper-prefill" or "cached", named in the file).
    Loss = cross-entropy on the response + lam * (expected FLOPs ratio of the batch - target)^2; the expectation is
    exact under independent draws (discarding is final, so the rate in force is the highest so far).
    tau: temperature of the distribution from the first to the last step, geometric; at the end a draw is nearly the
    argmax that inference takes. lr: of Adam at the first step, falling linearly to nothing.
    Before the first step the bias alone is fitted to the budget, so that training starts from a schedule that costs what
    is asked and does not look at the picture: whatever the classifier adds, it adds to that. A target below what the highest
    rate costs cannot be met, as text and the layers before P are never pruned: the log is warned, and told the range.

    inputs: what the predictor reads, one of `predictor_inputs.INPUTS` (see `RatePredictor`): the paper's attention shares, or a
    control. All else is the same for each: references, budget, start, draws of rates. "foreign" exchanges pictures within the
    batch; "oracle" is told what every token of a reference needs, which captions of scenes say.
    constraint: "penalty", the squared term above; "lagrangian", beside it mu (ratio - target) with mu += eta (ratio - target)
    after every step, from 0 (`training_budget.Lagrangian`); lam then damps, and eta is this constraint's alone.
    reversible: train for `DyRate(reversible=True)`, where dropped tokens may come back: m_t is the mask drawn at step t, and the
    prompt's pass is counted in full.

    Raises:
        InputError: a setting out of range, or fewer rows in a batch than processes; raised before the model runs. An item
            without references, or (for an oracle) that does not say what its words need: before the model runs if `dataset` is
            a list (else its first item), the others when they are drawn.
    """
    adapter, info = Adapter(model), model_info(model)
    check_settings(
        adapter.n_layers, target=target, convention=convention, layer=layer, lr=lr, lam=lam, tau=tau, steps=steps,
        batch_size=batch_size, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    check_controls(inputs, constraint, eta, reversible, convention, min(batch_size, len(dataset)))
    check_whole("seed", seed)
    for number, item in enumerate(dataset if isinstance(dataset, list | tuple) else ()):  # others may be costly to go through
        check_references(item, number)
    if len(dataset):
        distributed.rows(min(batch_size, len(dataset)))
    if inputs == "oracle":
        for number, item in enumerate(dataset if isinstance(dataset, list | tuple) else [dataset[0]] if len(dataset) else []):
            check_annotated(item, number)
    from tqdm.auto import tqdm

    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(seed)
    noise = torch.Generator(device=device).manual_seed(seed)
    hidden = info.hidden if inputs == "hidden" else None
    predictor = RatePredictor(adapter.n_heads, n_rates, layer, inputs=inputs, hidden=hidden).to(device).train()
    optimizer = torch.optim.Adam(predictor.parameters(), lr=lr)
    ratio_of = FlopsRatio(info, layer, n_rates, convention, reversible)
    held_by: Penalty = Penalty(target, lam) if constraint == "penalty" else Lagrangian(target, lam, eta)
    reader = FeatureReader(inputs, processor.tokenizer, max_new_tokens, seed)
    history: list[dict[str, float]] = []
    batches = _batches(dataset, batch_size, draw)

    def read_batch() -> tuple[TeacherForced, Tensor, Tensor, list[int]]:
        """This process's rows of the next batch: the pass, features and responses; and the lengths of all its responses."""
        indices = next(batches)
        items = [dataset[i] for i in indices]
        for i, item in zip(indices, items, strict=True):
            check_references(item, i)
        picks = [int(torch.randint(len(item.references), (1,), generator=draw)) for item in items]
        texts = [item.references[pick] for item, pick in zip(items, picks, strict=True)]
        response, lengths = encode_responses(processor.tokenizer, texts, max_new_tokens, device)
        mine = distributed.rows(len(indices))
        prompt = adapter.embed(
            _inputs(model, processor, dataset, [indices[i] for i in mine], [items[i] for i in mine], device)
        )
        forced = read_prompt_and_response(adapter, prompt, response[mine], layer)
        return forced, reader(forced, items, picks, lengths), response[mine], lengths

    first = [read_batch() for _ in range(_SCALING_BATCHES)]
    if inputs == "foreign":
        fill_bank(predictor, [(f, ns) for f, _, _, ns in first])
    rows = [seen[b, : ns[i]] for _, seen, _, ns in first for b, i in enumerate(distributed.rows(len(ns)))]
    scaled = _Scaled(predictor, torch.cat(rows))
    shapes = [(Lengths.of_all(f.prompt, len(ns)), ns) for f, _, _, ns in first[:2]]
    warn_if_out_of_reach(shapes, ratio_of, target)
    fit_bias(predictor.linear.bias, shapes, ratio_of, target, tau[0])
    learner = distributed.as_shared(scaled)
    del first, rows
    for step in tqdm(range(steps), desc=f"predictor, target {target}", disable=not progress or distributed.rank() > 0):
        forced, features, response, lengths = read_batch()
        now = tau[0] * (tau[1] / tau[0]) ** (step / max(steps - 1, 1))
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        figures, loss = predictor_loss(
            adapter, learner(features), forced, response, lengths, ratio_of, now, target, lam, noise, held_by
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        history.append({"step": step, "loss": float(loss.detach()), **figures, "tau": now})
        history[-1] |= held_by.update(figures["flops_ratio"])
        if callback is not None:
            callback(step, history[-1])
    predictor.metadata.update(
        model=info.name, target=target, convention=convention, seed=seed, steps=steps, batch_size=batch_size,
        lr=lr, lam=lam, tau=list(tau),
    )  # fmt: skip
    if isinstance(held_by, Lagrangian):
        predictor.metadata.update(constraint=constraint, eta=eta, mu=held_by.mu)
    if reversible:
        predictor.metadata.update(reversible=True)
    scaled.fold()
    return TrainResult(predictor.cpu().eval().requires_grad_(False), history)


def predictor_loss(
    adapter: Adapter, logits: Tensor, forced: TeacherForced, response: Tensor, lengths: Sequence[int],
    ratio_of: FlopsRatio, tau: float, target: float, lam: float, noise: torch.Generator | None,
    held_by: Penalty | None = None,
) -> tuple[dict[str, float], Tensor]:  # fmt: skip
    """One batch's loss from the predictor's logits [b, R, n_rates]: (figures for the history, differentiable scalar).

    The b rows are this process's (`distributed.rows`), all where there is one; lengths and figures are of the whole batch. The
    scalar's gradient, averaged over the processes, is the whole loss's. held_by: what holds the ratio; None is the penalty of
    `target` and `lam`.

    The temperature sharpens the distribution itself, for the draws and for the expected FLOPs alike. At a fixed one the
    two part: over the steps the highest of many draws lies far above the argmax, so training would meet the target
    where inference, which takes the argmax, does not come near it.
    """
    n_rates, n = logits.shape[-1], len(lengths)
    mine = distributed.rows(n)
    own = [lengths[i] for i in mine]
    held_by = Penalty(target, lam) if held_by is None else held_by
    sharpened = logits / tau
    one_hot = _drawn(sharpened, mine, n, noise)
    rate_masks = masks.prefix_masks(masks.kept_counts(forced.prompt.n_image, n_rates), forced.scores.shape[1]).float()
    keep = masks.select_masks(one_hot, rate_masks, ratio_of.reversible)
    predicted = masked_logits(adapter, forced, keep)
    valid = torch.arange(response.shape[1], device=response.device) < torch.tensor(own, device=response.device)[:, None]
    ratios = ratio_of(ratio_of.in_force(torch.softmax(sharpened, dim=-1)), forced.prompt, own)
    with torch.no_grad():
        chosen = hard_distribution(logits, ratio_of.reversible)
        hard = distributed.total(ratio_of(chosen, forced.prompt, own).sum()) / n
    if distributed.size() == 1:
        ce, ratio = F.cross_entropy(predicted[valid].float(), response[valid]), ratios.mean()
        loss = ce + held_by(ratio)
    else:
        told = F.cross_entropy(predicted[valid].float(), response[valid], reduction="sum") / sum(lengths)
        ce, ratio = distributed.total(told), distributed.total(ratios.sum()) / n
        part = told + held_by.slope(ratio) * ratios.sum() / n  # whose gradients add up to the loss's
        part = part * distributed.size()  # they are averaged, not summed
        loss = part + (ce + held_by(ratio) - part).detach()  # the whole loss's value, the part's gradient
    figures = {"ce": float(ce.detach()), "flops_ratio": float(ratio.detach()), "hard_ratio": float(hard)}
    return figures, loss


def _drawn(logits: Tensor, mine: Sequence[int], n: int, noise: torch.Generator | None) -> Tensor:
    """One draw of a rate a step, one-hot, for rows `mine` of a batch of n: the draws that one process alone would make."""
    if len(mine) == n:
        return masks.gumbel_one_hot(logits, 1.0, noise)
    whole = logits.new_zeros(n, *logits.shape[1:]).index_copy(0, torch.tensor(mine, device=logits.device), logits)
    return masks.gumbel_one_hot(whole, 1.0, noise)[mine]


class _Scaled(torch.nn.Module):
    """The linear classifier on scaled features while it learns; `fold` gives the plain one that computes the same.

    Shares differ between rows by a few hundredths, a bias by whole units: on them as they are, the bias alone would
    learn. Standardised ones have a length of sqrt(4 H), and the noise of the draws moves the logits as far as the signal
    does. So they are standardised and then divided by that: rows of unit length, on average. Hidden states likewise; one-hots
    have that length as they are, and where nothing is read nothing is scaled.
    """

    def __init__(self, predictor: RatePredictor, features: Tensor) -> None:
        super().__init__()
        self.predictor = predictor
        self.plain = predictor.inputs in (*BY_NUMBER, "none")
        if not self.plain:
            flat = predictor.rows(features).reshape(-1, predictor.linear.in_features)
            self.mean, std = distributed.mean_and_std(flat)
            self.std = std.clamp(min=1e-3) * flat.shape[-1] ** 0.5

    def forward(self, features: Tensor) -> Tensor:
        if self.plain:
            return self.predictor(features)
        return self.predictor.linear((self.predictor.rows(features) - self.mean) / self.std)

    @torch.no_grad()
    def fold(self) -> RatePredictor:
        linear = self.predictor.linear
        if not self.plain:
            linear.weight.div_(self.std)
            linear.bias.sub_(linear.weight @ self.mean)
        return self.predictor


__all__ = [
    "FlopsRatio", "TrainResult", "encode_responses", "flops_table", "hard_distribution", "masked_logits", "predictor_loss",
    "read_prompt_and_response", "train_predictor",
]  # fmt: skip
