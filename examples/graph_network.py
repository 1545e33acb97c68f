"""A graph network in plain torch is made sparse, and trained beside itself and its dense twin of equal FLOPs.

The nodes are scikit-learn's digits, linked with those most like them. Labels of a tenth are known in training:

    python examples/graph_network.py
"""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph
from torch import Tensor, nn

import core
from apps.report.intervals import mean_interval


class GraphNetwork(nn.Module):
    """In each step a node adds the mean of its neighbors to itself, and then what a small network makes of the sum."""

    def __init__(self, features: int, classes: int, dim: int = 64) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(features, dim), nn.Linear(dim, classes)
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(dim, 128), nn.GELU(), nn.Linear(128, dim)) for _ in range(2))

    def forward(self, x_NF: Tensor, source_M: Tensor, target_M: Tensor) -> Tensor:
        x_ND = self.embed(x_NF)
        neighbors = len(source_M) / len(x_ND)  # all nodes have as many
        for mlp in self.mlps:
            x_ND = x_ND.index_add(0, target_M, x_ND[source_M] / neighbors)
            x_ND = x_ND + mlp(nn.functional.layer_norm(x_ND, x_ND.shape[1:]))
        return self.head(x_ND)


@torch.enable_grad()
def train(model: nn.Module, graph: list[Tensor], y: Tensor, known: Tensor, steps: int) -> None:
    """Train a model in place on the whole graph, by the labels that are known."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for _ in range(steps):
        with core.record(model) as tape:
            loss = nn.functional.cross_entropy(model(*graph)[known], y[known])
        optimizer.zero_grad()
        (loss + core.aux_loss(tape)).backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    pixels, classes = load_digits(return_X_y=True)
    links = kneighbors_graph(pixels, 8).tocoo()
    graph = [torch.tensor(pixels / 16).float(), torch.tensor(links.col).long(), torch.tensor(links.row).long()]
    y = torch.tensor(classes)
    known, test = torch.randperm(len(y)).tensor_split([len(y) // 10])

    dense = GraphNetwork(pixels.shape[1], 10).eval()
    moe = core.MoEConfig(4, core.TokenChoice(2), balance=core.Balance(load_balancing_loss=0.01))
    sparse = core.sparsify(dense, moe, modules="mlps.*")
    print(core.summary(sparse, *graph))
    right, expected = {}, dense(*graph)
    for name, model in {"sparse": sparse, "twin": core.dense_twin(dense, like=sparse), "dense": dense}.items():
        change = (model(*graph) - expected).norm() / expected.norm()
        train(model, graph, y, known, args.steps)
        right[name] = (model(*graph)[test].argmax(1) == y[test]).float() * 100
        print(f"{name}: changed by {change:.1e} at step 0; accuracy {right[name].mean():.1f} % at step {args.steps}")
    gain = mean_interval((right["sparse"] - right["twin"]).tolist())
    shown = "a difference" if gain.excludes_zero else "no difference"
    print(f"sparse minus twin: {gain.low:+.1f} to {gain.high:+.1f} points ({gain.count} nodes, 1 seed): {shown} shown")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
