"""Density-peak clustering of tokens, as SparseVLM merges what it drops: pure tensor functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .errors import InputError


class Clusters(NamedTuple):
    """output [B, c, D] in x's dtype; centres [B, c], assignment [B, N] int64; density, score [B, N] float32."""

    output: Tensor
    centres: Tensor
    assignment: Tensor
    density: Tensor
    score: Tensor


def cluster_and_merge(x: Tensor, n_clusters: int, noise: Tensor | None = None) -> Clusters:
    """Tokens x [B, N, D] merged into `n_clusters` averages each, by density peaks with nearest neighbours (DPC-KNN).

    Distance is Euclidean over sqrt(D). Density is exp(-mean squared distance to the `n_clusters` nearest, oneself among
    them) + 1e-6 noise. A token's score is its density times the distance to the nearest denser token (to the farthest
    pair's distance, for the densest); the highest are centres, every token joins the nearest centre, a cluster is averaged.

    noise: [B, N] or [N] in [0, 1), None for zeros. The released code draws it afresh, so equal scores fall by chance there; here
    without noise always the same way.

    Raises:
        InputError: not 1 <= n_clusters <= N, or noise of another shape.
    """
    batch, n, width = x.shape
    if not 1 <= n_clusters <= n:
        raise InputError(f"{n} tokens cannot form {n_clusters} clusters: choose from 1 to {n}.")
    full = x.float()
    # not by matrix products: distances must be exactly symmetric, or mutual neighbours are not equally dense
    distance = torch.cdist(full, full, compute_mode="donot_use_mm_for_euclid_dist") * width**-0.5
    nearest = distance.topk(n_clusters, dim=-1, largest=False).values
    density = (-(nearest**2).mean(-1)).exp()
    if noise is not None:
        noise = torch.as_tensor(noise, device=x.device)
        if noise.shape not in ((n,), (batch, n)):
            raise InputError(
                f"noise for {batch} x {n} tokens must be [{n}] or [{batch}, {n}], got {tuple(noise.shape)}."
            )
        density = density + noise.to(density) * 1e-6
    denser = density[:, None, :] > density[:, :, None]
    farthest = distance.flatten(1).amax(-1)[:, None, None]
    score = torch.where(denser, distance, farthest).amin(-1) * density
    # equal scores in the order of torch's CPU topk, as in the authors' figures, on every device
    centres = score.cpu().topk(n_clusters, dim=-1).indices.to(x.device)
    to_centres = torch.gather(distance, 1, centres[..., None].expand(-1, -1, n))
    own = torch.arange(n_clusters, device=x.device).expand_as(centres)
    assignment = to_centres.argmin(1).scatter(1, centres, own)  # a centre is its own cluster's, whatever lies near
    members = torch.nn.functional.one_hot(assignment, n_clusters).transpose(1, 2).to(full.dtype)
    output = (members @ full) / (members.sum(-1, keepdim=True) + 1e-6)
    return Clusters(output.to(x.dtype), centres, assignment, density, score)
