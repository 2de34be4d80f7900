"""What the methods that cut before the LLM compute from a picture's features: scores, choices, merges. Pure tensors.

M pictures of N patches at a time, all of one size. Vision towers put a CLS token in front: "with CLS" means N + 1 rows,
row 0 the CLS token. Every picture's result is the same alone and in any batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import gather_columns


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of every row of a [M, R, C] with every row of b [M, S, C], in float32: [M, R, S]. Zero rows give 0."""
    return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).transpose(-1, -2)


def cls_attention(q: Tensor, k: Tensor, n_heads: int = 1) -> Tensor:
    """How the CLS row of a vision layer attends to the patches, head by head.

    q: [M, 1, C], the CLS row; k: [M, N + 1, C]; split into n_heads (1: one head of full width, scale C^-0.5).
    Returns [M, n_heads, N] float32: the softmax runs over all N + 1 columns, the CLS column is then left out.
    """
    m, rows, width = k.shape
    heads = k.float().view(m, rows, n_heads, width // n_heads).transpose(1, 2)
    query = q.float().view(m, 1, n_heads, width // n_heads).transpose(1, 2)
    scores = query @ heads.transpose(-1, -2) * (width // n_heads) ** -0.5
    return torch.softmax(scores, dim=-1)[:, :, 0, 1:]


def rank(scores: Tensor) -> Tensor:
    """Indices from the largest to the smallest of [M, N], ties to the lower index: [M, N] int64."""
    return torch.argsort(scores, dim=-1, descending=True, stable=True)


def complement(index: Tensor, n: int) -> Tensor:
    """The n - K of 0..n-1 that are not in index [M, K] (no repeats), ascending: [M, n - K] int64."""
    chosen = torch.zeros(index.shape[0], n, dtype=torch.long, device=index.device).scatter_(1, index, 1)
    return torch.argsort(chosen, dim=-1, stable=True)[:, : n - index.shape[1]]


# -- VisionZip ---------------------------------------------------------------------------------------------------------


def contextual_tokens(features: Tensor, keys: Tensor, n: int) -> Tensor:
    """Merge R tokens into n: evenly spaced targets, each with the mean of the tokens whose keys are nearest to it.

    features [M, R, C]; keys [M, R, d]; 0 <= n <= R. Targets are every (R // n)-th token, the first n of them; another
    token joins the target of largest cosine. Returns [M, n, C]: target + mean(joined), the target itself where none did.
    """
    m, rows, width = features.shape
    if n == 0:
        return features[:, :0]
    index = torch.arange(0, rows, rows // n, device=features.device)[:n].expand(m, n)
    rest = complement(index, rows)
    joins = cosine(gather_columns(keys, rest), gather_columns(keys, index)).argmax(-1)
    member = F.one_hot(joins, n).to(features.dtype)
    mean = member.transpose(-1, -2) @ gather_columns(features, rest)
    mean = mean / member.sum(1).clamp(min=1)[..., None]
    return gather_columns(features, index) + mean


# -- PruMerge ----------------------------------------------------------------------------------------------------------


def outlier_share(scores: Tensor) -> Tensor:
    """Share of values above Q3 + 1.5 IQR (quartiles interpolated linearly): [M, N] to [M] float64."""
    values = scores.double()
    low, high = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=values.dtype, device=values.device), dim=-1)
    return (values > (high + 1.5 * (high - low))[:, None]).double().mean(-1)


def merge_nearest(
    features: Tensor, keys: Tensor, attention: Tensor, order: Tensor, count: Tensor, nearest: int = 32
) -> tuple[Tensor, Tensor]:
    """Add to each kept token its nearest others, and make one token of all that is pruned.

    features [M, N, C]; keys [M, N, d]; attention [M, N], the weights; order [M, N] int64: the kept patches, then the
    pruned ones; count [M] int64: how many are kept. A patch may stand in `order` twice: each copy is one of the others.
    nearest: how many others (kept or not) by cosine of keys, at most N - 1.
    Returns the kept rows [M, max(count), C] (past a picture's count they mean nothing) and the extra one [M, 1, C], the
    attention-weighted sum of the pruned ones.
    """
    n, k = order.shape[1], int(count.max())
    features, keys = gather_columns(features, order), gather_columns(keys, order)
    weights = torch.gather(attention, 1, order).to(features.dtype)
    own = torch.arange(k, device=order.device)[:, None] == torch.arange(n, device=order.device)
    near = cosine(keys[:, :k], keys).masked_fill(own, -torch.inf).topk(min(nearest, n - 1), dim=-1).indices
    share = weights[:, None].expand(-1, k, -1)
    mix = torch.zeros_like(share).scatter(2, near, torch.gather(share, 2, near))
    pruned = torch.arange(n, device=order.device) >= count[:, None]
    return features[:, :k] + mix @ features, (weights * pruned)[:, None] @ features


# -- DivPrune ----------------------------------------------------------------------------------------------------------


def farthest_first(features: Tensor, n: int) -> Tensor:
    """Spread n picks over the features [M, N, C] (max-min of 1 - cosine): [M, n] int64, in the order picked.

    First the token whose nearest other token is farthest, then always the one whose nearest pick is farthest.
    """
    m, rows, _ = features.shape
    # without an epsilon, as released; a zero vector (0/0) counts as unlike everything
    unit = (features.float() / features.float().norm(dim=-1, keepdim=True)).nan_to_num(0.0)
    distance = 1.0 - unit @ unit.transpose(-1, -2)
    others = distance.masked_fill(torch.eye(rows, dtype=torch.bool, device=features.device), torch.inf)
    gap, picks = others.amin(-1), []
    lines = torch.arange(m, device=features.device)
    free = torch.ones(m, rows, dtype=torch.bool, device=features.device)
    for step in range(n):
        pick = gap.masked_fill(~free, -torch.inf).argmax(-1)
        free[lines, pick] = False
        picks.append(pick)
        gap = distance[lines, pick] if step == 0 else torch.minimum(gap, distance[lines, pick])
    return torch.stack(picks, 1) if picks else torch.zeros(m, 0, dtype=torch.long, device=features.device)


# -- CDPruner ----------------------------------------------------------------------------------------------------------


def unit_range(scores: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Each row of [M, N] stretched to (0, 1 + epsilon / span]; all ones where a row is constant (no token is more relevant)."""
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    span = high - low
    return torch.where(span > 0, (scores - low + epsilon) / span.clamp(min=torch.finfo(scores.dtype).tiny), 1.0)


def conditional_kernel(features: Tensor, relevance: Tensor) -> Tensor:
    """L_ij = r_i cos(f_i, f_j) r_j in float32. features [M, N, C]; relevance [M, N]. Returns [M, N, N]."""
    r = relevance.float()
    return r[:, :, None] * cosine(features, features) * r[:, None]


def greedy_dpp(kernel: Tensor, n: int, tolerance: float = 1e-6) -> Tensor:
    """Greedy MAP of a determinantal point process: n picks for each kernel [M, N, N], [M, n] int64 in the order picked.

    Each pick has the largest variance left given the earlier picks (incremental Cholesky). Guard: what is left below
    `tolerance` of a token's own variance is rounding, so such tokens are linear combinations of the picks; they are
    taken last, by their own variance (relevance), and never divided by.
    """
    m, rows, _ = kernel.shape
    own = kernel.diagonal(dim1=-2, dim2=-1).clone()
    gain, lines = own.clone(), torch.arange(m, device=kernel.device)
    floor = tolerance * own.clamp(min=torch.finfo(kernel.dtype).tiny)
    behind = 2 * own.amax(-1, keepdim=True) + 1
    free = torch.ones(m, rows, dtype=torch.bool, device=kernel.device)
    factors = kernel.new_zeros(n, m, rows)
    picks = []
    for step in range(n):
        fresh = gain > floor
        pick = torch.where(fresh, gain, own - behind).masked_fill(~free, -torch.inf).argmax(-1)
        free[lines, pick] = False
        picks.append(pick)
        earlier = factors[:step]
        row = kernel[lines, pick] - (earlier[:, lines, pick][..., None] * earlier).sum(0)
        row = row / torch.maximum(gain[lines, pick], floor[lines, pick]).sqrt()[:, None]
        row = torch.where(fresh[lines, pick][:, None], row, 0.0)
        factors[step] = row
        gain = gain - row**2
    return torch.stack(picks, 1) if picks else torch.zeros(m, 0, dtype=torch.long, device=kernel.device)
