"""A layer of one-neuron experts (PEER) by the number of experts: time of a training step, memory, and recall.

    python benchmarks/peer.py
    python benchmarks/peer.py --experts 1048576 --rounds 9

A step is the forward, the backward and ``RowAdam`` over new random tokens. Recall is the part of the chosen experts
that brute force over all E would choose, for some of the tokens. The memory is the resident peak of the process, beside
that of the parameters and the two moments of each. The processor time is that of all threads: on a busy machine it
says more than the time that has passed.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import resource
import statistics
import time

import torch
from torch import Tensor

import core
from core.routing.product_keys import ProductKeysRouter

SIZES = [2**power for power in range(10, 21, 2)]


def recall(router: ProductKeysRouter, x_TD: Tensor) -> float:
    """Return the part of each head's K best experts, by all E scores, that the router chose."""
    H, K = router.config.heads, router.config.top_k
    chosen_THK = router(x_TD[None]).expert_ids_N.view(-1, H, K)
    q_TH2Q = (x_TD @ router.w_query.t()).unflatten(1, (H, 2, -1))
    hits = 0
    for q_H2Q, chosen_HK in zip(q_TH2Q, chosen_THK, strict=True):
        first, second = (q_H2Q[:, half] @ router.keys[half, 0].t() for half in (0, 1))
        scores_HE = (first[:, :, None] + second[:, None, :]).flatten(1)
        worst_H1 = scores_HE.topk(K, -1).values[:, -1:]
        # By score: an equal one is as good. The float32 products here and in the router may differ in the last bit.
        distinct = sum(len(set(row.tolist())) for row in chosen_HK)
        assert distinct == H * K
        hits += int((scores_HE.gather(1, chosen_HK) >= worst_H1 - 1e-5).sum())
    return hits / chosen_THK.numel()


def measure(num_experts: int, args: argparse.Namespace) -> str:
    """Return a row of the table."""
    config = core.MoEConfig(num_experts, core.ProductKeys(args.top_k, args.heads), core.PEER(row_sparse=True))
    torch.manual_seed(0)
    layer = config.build(args.dim)
    optimizer = core.RowAdam(layer.parameters(), lr=1e-3)
    times: list[list[float]] = []
    processor: list[float] = []
    touched = 0
    for _ in range(args.rounds + 1):  # the first one makes the state
        x = torch.randn(1, args.tokens, args.dim, requires_grad=True)
        before, marks = time.process_time(), [time.perf_counter()]
        with core.record(layer):
            y = layer(x)
        marks.append(time.perf_counter())
        y.square().mean().backward()
        marks.append(time.perf_counter())
        optimizer.step()
        marks.append(time.perf_counter())
        processor.append(time.process_time() - before)
        touched = layer.experts.u.grad._nnz()
        optimizer.zero_grad()
        del y
        times.append([b - a for a, b in itertools.pairwise(marks)])
    steps = sorted(sum(parts) for parts in times[1:])
    forward, backward, step = (statistics.median(column) for column in zip(*times[1:], strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    state = 3 * 4 * config.num_params(args.dim) / 2**30
    with torch.no_grad():
        share = recall(layer.router, torch.randn(args.recall_tokens, args.dim))
    low, high = steps[len(steps) // 4], steps[-1 - len(steps) // 4]
    return (
        f"| {num_experts:,} | {forward * 1e3:.0f} | {backward * 1e3:.0f} | {step * 1e3:.0f} | "
        f"{statistics.median(steps) * 1e3:.0f} ({low * 1e3:.0f}-{high * 1e3:.0f}) | "
        f"{statistics.median(processor[1:]) * 1e3:.0f} | {touched:,} | {share:.4f} | {state:.2f} | {peak:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=SIZES, help="numbers of experts, squares")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--top_k", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recall_tokens", type=int, default=16)
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    columns = ("experts", "forward, ms", "backward, ms", "optimizer, ms", "step, ms (quartiles)", "processor time, ms")
    columns += ("rows", "recall", "parameters and state, GiB", "peak, GiB")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for num_experts in sorted(args.experts):  # the peak of a process never falls
        print(measure(num_experts, args), flush=True)


if __name__ == "__main__":
    main()
