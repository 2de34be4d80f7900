"""Training the rate predictor: teacher forcing, straight-through Gumbel-softmax, cross-entropy plus a FLOPs term.

The VLM is frozen; only the predictor learns. Since layers < P see every token, the attention shares v_t of all steps
come from one unpruned pass and do not depend on the rates drawn, so one forward pass trains all steps of a response.

Under `torchrun` or `accelerate launch` (`distributed`) every batch is shared by row among the processes: the same rows, draws
and loss as with one, so the predictor is the same to float rounding, whatever their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import distributed, masks
from .accounting import flop_steps
from .errors import InputError, check_whole
from .loading import prepare_inputs
from .models import Adapter, ModelInfo, Prompt, model_info
from .predictor import RatePredictor
from .prompts import chat_prompt
from .teacher_forcing import TeacherForced, masked_logits, read_prompt_and_response
from .training_checks import check_references, check_settings, warn_if_out_of_reach

_SCALING_BATCHES = 8  # batches whose shares set the scale of the classifier's inputs
_WARM_STEPS, _WARM_LR = 200, 0.05  # the bias is fitted to the budget first; this costs no pass of the model


@dataclass
class TrainResult:
    """A trained predictor and its history: a list of dicts (step, loss, ce, flops_ratio, hard_ratio, tau)."""

    predictor: RatePredictor
    history: list[dict[str, float]] = field(default_factory=list)


def flops_table(
    info: ModelInfo, prompt_length: int, n_image: int, steps: int, layer: int, n_rates: int, convention: str
) -> tuple[Tensor, float]:
    """FLOPs of each step under each rate: ([steps, n_rates] float64, unpruned total).

    A step's FLOPs depend on that step's own kept count only (the prefill's on the first), so a path's cost is a sum
    over this table and its expectation is linear in the rates' distribution.
    """
    counts = masks.kept_counts(torch.tensor(n_image), n_rates).tolist()
    columns = []
    for kept in counts:
        by_layer = torch.full((steps, info.n_layers), float(n_image), dtype=torch.float64)
        by_layer[:, layer:] = float(kept)
        columns.append(torch.as_tensor(flop_steps(info, prompt_length, n_image, by_layer.numpy(), convention)))
    table = torch.stack(columns, dim=-1).double()
    return table, float(table[:, 0].sum())


class FlopsRatio:
    """FLOPs ratio of a batch's paths, as a differentiable function of the rates' distribution at each step."""

    def __init__(self, info: ModelInfo, layer: int, n_rates: int, convention: str) -> None:
        self.info, self.layer, self.n_rates, self.convention = info, layer, n_rates, convention
        self._tables: dict[tuple[int, int, int], tuple[Tensor, float]] = {}

    def __call__(self, distribution: Tensor, prompt: Prompt | _Lengths, lengths: Sequence[int]) -> Tensor:
        """[B, R, n_rates] distribution of the rate in force at each step; lengths: valid steps. Returns [B]."""
        out = []
        triples = zip(prompt.length.tolist(), prompt.n_image.tolist(), lengths, strict=True)
        for row, key in zip(distribution, triples, strict=True):
            if key not in self._tables:
                self._tables[key] = flops_table(self.info, *key, self.layer, self.n_rates, self.convention)
            table, whole = self._tables[key]
            out.append((row[: key[2]].double() * table.to(row.device)).sum() / whole)
        return torch.stack(out).float()


def hard_distribution(logits: Tensor) -> Tensor:
    """One-hot of the rate that inference would have in force: running maximum of the argmax. [B, R, n_rates]."""
    return F.one_hot(logits.argmax(-1).cummax(dim=1).values, logits.shape[-1]).to(logits.dtype)


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

    Raises:
        InputError: a setting out of range, or fewer rows in a batch than processes; raised before the model runs. An item
            without references: before the model runs if `dataset` is a list, else when it is drawn.
    """
    adapter, info = Adapter(model), model_info(model)
    check_settings(
        adapter.n_layers, target=target, convention=convention, layer=layer, lr=lr, lam=lam, tau=tau, steps=steps,
        batch_size=batch_size, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    check_whole("seed", seed)
    for number, item in enumerate(dataset if isinstance(dataset, list | tuple) else ()):  # others may be costly to go through
        check_references(item, number)
    if len(dataset):
        distributed.rows(min(batch_size, len(dataset)))
    from tqdm.auto import tqdm

    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(seed)
    noise = torch.Generator(device=device).manual_seed(seed)
    predictor = RatePredictor(adapter.n_heads, n_rates, layer).to(device).train()
    optimizer = torch.optim.Adam(predictor.parameters(), lr=lr)
    ratio_of = FlopsRatio(info, layer, n_rates, convention)
    history: list[dict[str, float]] = []
    batches = _batches(dataset, batch_size, draw)

    def read_batch() -> tuple[TeacherForced, Tensor, list[int]]:
        """This process's rows of the next batch, and the lengths of all its responses."""
        indices = next(batches)
        items = [dataset[i] for i in indices]
        for i, item in zip(indices, items, strict=True):
            check_references(item, i)
        picks = [int(torch.randint(len(item.references), (1,), generator=draw)) for item in items]
        texts = [item.references[pick] for item, pick in zip(items, picks, strict=True)]
        response, lengths = encode_responses(processor.tokenizer, texts, max_new_tokens, device)
        mine = distributed.rows(len(indices))
        inputs = _inputs(model, processor, dataset, [indices[i] for i in mine], [items[i] for i in mine], device)
        return read_prompt_and_response(adapter, adapter.embed(inputs), response[mine], layer), response[mine], lengths

    first = [read_batch() for _ in range(_SCALING_BATCHES)]
    rows = [f.shares[b, : ns[i]] for f, _, ns in first for b, i in enumerate(distributed.rows(len(ns)))]
    scaled = _Scaled(predictor, torch.cat(rows))
    shapes = [(_Lengths.of_all(f.prompt, len(ns)), ns) for f, _, ns in first[:2]]
    warn_if_out_of_reach(shapes, ratio_of, target)
    _fit_bias(predictor, shapes, ratio_of, target, tau[0])
    learner = distributed.as_shared(scaled)
    del first, rows
    for step in tqdm(range(steps), desc=f"predictor, target {target}", disable=not progress or distributed.rank() > 0):
        forced, response, lengths = read_batch()
        now = tau[0] * (tau[1] / tau[0]) ** (step / max(steps - 1, 1))
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        figures, loss = predictor_loss(
            adapter, learner(forced.shares), forced, response, lengths, ratio_of, now, target, lam, noise
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        history.append({"step": step, "loss": float(loss.detach()), **figures, "tau": now})
        if callback is not None:
            callback(step, history[-1])
    predictor.metadata.update(
        model=info.name, target=target, convention=convention, seed=seed, steps=steps, batch_size=batch_size,
        lr=lr, lam=lam, tau=list(tau),
    )  # fmt: skip
    scaled.fold()
    return TrainResult(predictor.cpu().eval().requires_grad_(False), history)


def predictor_loss(
    adapter: Adapter, logits: Tensor, forced: TeacherForced, response: Tensor, lengths: Sequence[int],
    ratio_of: FlopsRatio, tau: float, target: float, lam: float, noise: torch.Generator | None,
) -> tuple[dict[str, float], Tensor]:  # fmt: skip
    """One batch's loss from the predictor's logits [b, R, n_rates]: (figures for the history, differentiable scalar).

    The b rows are this process's (`distributed.rows`), all where there is one; lengths and figures are of the whole batch. The
    scalar's gradient, averaged over the processes, is the whole loss's.

    The temperature sharpens the distribution itself, for the draws and for the expected FLOPs alike. At a fixed one the
    two part: over the steps the highest of many draws lies far above the argmax, so training would meet the target
    where inference, which takes the argmax, does not come near it.
    """
    n_rates, n = logits.shape[-1], len(lengths)
    mine = distributed.rows(n)
    own = [lengths[i] for i in mine]
    sharpened = logits / tau
    one_hot = _drawn(sharpened, mine, n, noise)
    rate_masks = masks.prefix_masks(masks.kept_counts(forced.prompt.n_image, n_rates), forced.scores.shape[1]).float()
    keep = masks.select_masks(one_hot, rate_masks)
    predicted = masked_logits(adapter, forced, keep)
    valid = torch.arange(response.shape[1], device=response.device) < torch.tensor(own, device=response.device)[:, None]
    in_force = masks.running_rate_distribution(torch.softmax(sharpened, dim=-1))
    ratios = ratio_of(in_force, forced.prompt, own)
    with torch.no_grad():
        hard = distributed.total(ratio_of(hard_distribution(logits), forced.prompt, own).sum()) / n
    if distributed.size() == 1:
        ce, ratio = F.cross_entropy(predicted[valid].float(), response[valid]), ratios.mean()
        loss = ce + lam * (ratio - target) ** 2
    else:
        told = F.cross_entropy(predicted[valid].float(), response[valid], reduction="sum") / sum(lengths)
        ce, ratio = distributed.total(told), distributed.total(ratios.sum()) / n
        part = told + 2 * lam * (ratio - target) * ratios.sum() / n  # whose gradients add up to the loss's
        part = part * distributed.size()  # they are averaged, not summed
        loss = part + (ce + lam * (ratio - target) ** 2 - part).detach()  # the whole loss's value, the part's gradient
    figures = {"ce": float(ce.detach()), "flops_ratio": float(ratio.detach()), "hard_ratio": float(hard)}
    return figures, loss


def _drawn(logits: Tensor, mine: Sequence[int], n: int, noise: torch.Generator | None) -> Tensor:
    """One draw of a rate a step, one-hot, for rows `mine` of a batch of n: the draws that one process alone would make."""
    if len(mine) == n:
        return masks.gumbel_one_hot(logits, 1.0, noise)
    whole = logits.new_zeros(n, *logits.shape[1:]).index_copy(0, torch.tensor(mine, device=logits.device), logits)
    return masks.gumbel_one_hot(whole, 1.0, noise)[mine]


class _Lengths(NamedTuple):
    """What the FLOPs of prompts hang on; as in `Prompt`."""

    length: Tensor
    n_image: Tensor

    @classmethod
    def of_all(cls, prompt: Prompt, n: int) -> _Lengths:
        return cls(distributed.gathered(prompt.length, n), distributed.gathered(prompt.n_image, n))


def _fit_bias(
    predictor: RatePredictor, batches: Sequence[tuple[_Lengths, Sequence[int]]], ratio_of: FlopsRatio, target: float, tau: float
) -> None:  # fmt: skip
    """Give the bias the values at which a distribution that ignores its input meets the budget, drawn at `tau`."""
    bias = predictor.linear.bias
    optimizer = torch.optim.Adam([bias], lr=_WARM_LR)
    for _ in range(_WARM_STEPS):
        error = torch.zeros((), device=bias.device)
        for prompt, lengths in batches:
            drawn = torch.softmax(bias / tau, dim=-1).expand(len(lengths), max(lengths), -1)
            ratio = ratio_of(masks.running_rate_distribution(drawn), prompt, lengths).mean()
            error = error + (ratio - target) ** 2
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        optimizer.step()


class _Scaled(torch.nn.Module):
    """The linear classifier on scaled shares while it learns; `fold` gives the plain one that computes the same.

    Shares differ between rows by a few hundredths, a bias by whole units: on them as they are, the bias alone would
    learn. Standardised ones have a length of sqrt(4 H), and the noise of the draws moves the logits as far as the signal
    does. So they are standardised and then divided by that: rows of unit length, on average.
    """

    def __init__(self, predictor: RatePredictor, rows: Tensor) -> None:
        super().__init__()
        flat = rows.float().flatten(-2).reshape(-1, 4 * predictor.n_heads)
        self.predictor = predictor
        self.mean, std = distributed.mean_and_std(flat)
        self.std = std.clamp(min=1e-3) * flat.shape[-1] ** 0.5

    def forward(self, shares: Tensor) -> Tensor:
        return self.predictor.linear((shares.float().flatten(-2) - self.mean) / self.std)

    @torch.no_grad()
    def fold(self) -> RatePredictor:
        linear = self.predictor.linear
        linear.weight.div_(self.std)
        linear.bias.sub_(linear.weight @ self.mean)
        return self.predictor
