"""k-means with clusters of equal size, for hashes that keep like tokens together."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.eager import capacity_ranks


@torch.no_grad()
def balanced_clusters(points_ND: Tensor, num_clusters: int, *, seed: int = 0, num_iterations: int = 20) -> Tensor:
    """Return the cluster of each point, int64 (N,), by Lloyd's iterations; sizes differ by at most 1.

    Args:
        points_ND: (N, D), finite.
        num_clusters: number of clusters, at most N.
        seed: seed of the first centers, sampled among the points.
        num_iterations: most iterations.

    Raises:
        ValueError: more clusters than points, or a coordinate that is not finite.
    """
    N = len(points_ND)
    if not 1 <= num_clusters <= N:
        raise ValueError(f"num_clusters={num_clusters} is not between 1 and {N} points")
    if not bool(points_ND.isfinite().all()):
        raise ValueError("a point to cluster is not finite")
    points_ND = points_ND.detach().float()
    drawn = torch.randperm(N, generator=torch.Generator().manual_seed(seed), device="cpu")[:num_clusters]
    centers = points_ND[drawn.to(points_ND.device)]
    cluster_N = assign_equally(points_ND, centers)
    for _ in range(num_iterations):
        sizes = torch.bincount(cluster_N, minlength=num_clusters)
        centers = torch.zeros_like(centers).index_add_(0, cluster_N, points_ND) / sizes[:, None]
        before, cluster_N = cluster_N, assign_equally(points_ND, centers)
        if torch.equal(before, cluster_N):
            break
    return cluster_N


def assign_equally(points_ND: Tensor, centers_ED: Tensor) -> Tensor:
    """Assign each of (N, D) points to a near one of (E, D) centers, int64 (N,): each center takes N // E points or one
    more, the nearest points that prefer it, and the others take their next nearest center with room."""
    N, E = len(points_ND), len(centers_ED)
    distance_NE = torch.cdist(points_ND, centers_ED)
    cluster_N = torch.full((N,), E, device=points_ND.device)
    # Each cluster takes N // E points first; then some take one more.
    for size in (N // E, 1):
        room_E = torch.full((E,), size, device=points_ND.device)
        while bool((free_N := cluster_N == E).any()) and bool(room_E.any()):
            nearest = distance_NE.masked_fill(room_E == 0, torch.inf).min(-1)
            wanted_N = torch.where(free_N, nearest.indices, E)
            rank_N = capacity_ranks(wanted_N, nearest.values.argsort(stable=True).argsort(), E + 1)
            taken_N = free_N & (rank_N < room_E[nearest.indices])
            cluster_N = torch.where(taken_N, nearest.indices, cluster_N)
            room_E = room_E - torch.bincount(wanted_N[taken_N], minlength=E)
    return cluster_N
