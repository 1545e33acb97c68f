"""Sentence encoders of BERT's layout, such as MiniLM, read from a published folder: texts become vectors."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.porting import files

_LONGEST_WORD = 100  # characters; a longer one is unknown, as in BERT's tokenizer
_BATCH = 64


class WordPieces:
    """BERT's tokenizer: words and punctuation, each cut into the longest pieces that there are, from its beginning.

    Args:
        pieces: the pieces, in the order of their ids; those within a word begin with "##".
        lower_case: whether to lower the case and to drop accents.

    Raises:
        ValueError: one of [PAD], [UNK], [CLS] and [SEP] is missing.
    """

    def __init__(self, pieces: Sequence[str], lower_case: bool = True) -> None:
        self.ids, self.lower_case = {piece: i for i, piece in enumerate(pieces)}, lower_case
        for piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]"):
            if piece not in self.ids:
                raise ValueError(f"the {len(self.ids):,} word pieces lack {piece}")

    @classmethod
    def of(cls, folder: Path) -> WordPieces:
        """Return the pieces of ``vocab.txt``, and the case of ``tokenizer_config.json`` where there is one."""
        try:
            pieces = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ValueError(f"{folder / 'vocab.txt'} cannot be read: {error.strerror}") from error
        options = folder / "tokenizer_config.json"
        lower_case = files.read_json(options).get("do_lower_case", True) if options.is_file() else True
        return cls(pieces, bool(lower_case))

    def encode(self, text: str, most: int) -> list[int]:
        """Return the ids of at most ``most`` pieces, the first [CLS] and the last [SEP]."""
        ids = [self.ids["[CLS]"]]
        for word in self._words(text):
            ids += self._cut(word)
            if len(ids) >= most:
                break
        return [*ids[: most - 1], self.ids["[SEP]"]]

    def _words(self, text: str) -> Iterator[str]:
        if self.lower_case:
            text = unicodedata.normalize("NFD", text.lower())
            text = "".join(c for c in text if unicodedata.category(c) != "Mn")
        spaced = []
        for c in text:
            if _stands_alone(c):
                spaced.append(f" {c} ")
            elif c.isspace():
                spaced.append(" ")
            elif unicodedata.category(c)[0] != "C" and c != "\ufffd":
                spaced.append(c)
        return iter("".join(spaced).split())

    def _cut(self, word: str) -> list[int]:
        if len(word) > _LONGEST_WORD:
            return [self.ids["[UNK]"]]
        ids, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            for end in range(len(word), start, -1):
                if (piece := self.ids.get(prefix + word[start:end])) is not None:
                    break
            else:
                return [self.ids["[UNK]"]]
            ids.append(piece)
            start = end
        return ids


def _stands_alone(c: str) -> bool:
    """Tell whether a character is a word of its own: punctuation, ASCII symbols, and Chinese characters."""
    code = ord(c)
    is_symbol = 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126
    return is_symbol or unicodedata.category(c)[0] == "P" or unicodedata.name(c, "").startswith("CJK ")


class _Layer(nn.Module):
    """One of BERT's layers: attention, then a feed-forward network, each normalised after its residual."""

    def __init__(self, dim: int, hidden_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_1, self.norm_2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.up, self.down = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)

    def forward(self, x_NSD: Tensor, is_real_NS: Tensor) -> Tensor:
        q, k, v = (
            part(x_NSD).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=is_real_NS[:, None, None])
        x_NSD = self.norm_1(x_NSD + self.out(y.transpose(1, 2).flatten(2)))
        return self.norm_2(x_NSD + self.down(F.gelu(self.up(x_NSD))))


_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "norm_1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm_2": "output.LayerNorm",
}


class SentenceEncoder(nn.Module):
    """BERT's encoder, whose mean over a text's pieces, at unit length, is the text's vector (arXiv 1908.10084).

    Args:
        folder: ``config.json`` of ``model_type`` "bert", ``vocab.txt`` and weights, as they are published.

    Attributes:
        dim: numbers of a vector.
        most: largest number of pieces that it reads.

    Raises:
        ValueError: a file that is missing or cannot be read, another kind of model, or a tensor that is missing or of
            another shape.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        folder = Path(folder).expanduser()
        config = files.read_config(folder)
        if config["model_type"] != "bert" or config.get("hidden_act", "gelu") != "gelu":
            raise ValueError(
                f"{folder} holds a model of type {config['model_type']!r} ({config.get('hidden_act')}): a sentence "
                "encoder is read where it is of type 'bert' with gelu"
            )
        self.pieces, tensors = WordPieces.of(folder), files.Tensors(folder)
        self.dim, self.most = int(config["hidden_size"]), int(config["max_position_embeddings"])
        eps = float(config.get("layer_norm_eps", 1e-12))
        self.words = nn.Embedding(config["vocab_size"], self.dim)
        self.places = nn.Embedding(self.most, self.dim)
        self.kind = nn.Parameter(torch.empty(self.dim))
        self.norm = nn.LayerNorm(self.dim, eps)
        sizes = (self.dim, int(config["intermediate_size"]), int(config["num_attention_heads"]), eps)
        self.layers = nn.ModuleList(_Layer(*sizes) for _ in range(config["num_hidden_layers"]))
        self.load_state_dict({name: _tensor(tensors, name, folder) for name in self.state_dict()})
        self.eval().requires_grad_(False)

    def forward(self, ids_NS: Tensor) -> Tensor:
        """Return the vectors (N, dim) of texts as ids of pieces, padded by [PAD]."""
        is_real_NS = ids_NS != self.pieces.ids["[PAD]"]
        x_NSD = self.norm(self.words(ids_NS) + self.places.weight[: ids_NS.shape[1]] + self.kind)
        for layer in self.layers:
            x_NSD = layer(x_NSD, is_real_NS)
        return F.normalize((x_NSD * is_real_NS[..., None]).sum(1), dim=1)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], max_tokens: int) -> Tensor:
        """Return the vectors of texts, float32 (N, dim).

        Args:
            texts: the texts, of which the first ``max_tokens`` pieces are read.
            max_tokens: largest number of pieces, [CLS] and [SEP] among them.
        """
        most = min(max_tokens, self.most)
        ids = [self.pieces.encode(text, most) for text in texts]
        # Texts of about one length share a batch, so that little of it is padding.
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        y_ND = torch.empty(len(ids), self.dim)
        for start in range(0, len(order), _BATCH):
            places = order[start : start + _BATCH]
            longest = len(ids[places[-1]])
            padded = [ids[i] + [self.pieces.ids["[PAD]"]] * (longest - len(ids[i])) for i in places]
            y_ND[places] = self(torch.tensor(padded, device=self.kind.device)).float().cpu()
        return y_ND


def _tensor(tensors: files.Tensors, name: str, folder: Path) -> Tensor:
    """Return the published tensor of a parameter."""
    first, _, rest = name.partition(".")
    if first == "layers":
        number, part, kind = rest.split(".")
        theirs = f"encoder.layer.{number}.{_NAMES[part]}.{kind}"
    else:
        theirs = {
            "words.weight": "embeddings.word_embeddings.weight",
            "places.weight": "embeddings.position_embeddings.weight",
            "kind": "embeddings.token_type_embeddings.weight",
        }.get(name, f"embeddings.LayerNorm.{rest}")
    for own in (theirs, f"bert.{theirs}"):
        if own in tensors:
            value: Any = tensors[own].float()
            return value[0] if name == "kind" else value
    raise ValueError(f"{folder} lacks the tensor {theirs!r}")
