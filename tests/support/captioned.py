"""Images of plain colours with the colours' names, small enough to count by hand, and captioners of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

import core
from apps.data.subwords import SubwordConfig, train_subwords
from apps.multimodal.captions.module import ImageCaptioner
from apps.multimodal.pairs.encoding import PairEncoding, TextEncoding
from apps.multimodal.pairs.pairs import PairBatch
from apps.nets.config import TransformerConfig
from apps.vision.model import ViTConfig

SIDE = 8
COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0), "white": (1.0, 1.0, 1.0)}
TEXTS = tuple(f"a {name} picture" for name in COLOURS)
MOE = core.MoEConfig(num_experts=4, router=core.TokenChoice(top_k=2), expert=core.FFN(hidden_dim=8, activation="relu"))
VIT = ViTConfig(embed_dim=16, depth=2, num_heads=2, patch_size=4)
DECODER = TransformerConfig("nano", dim=16, hidden_dim=16, num_heads=2, dropout=0.0)


@cache
def encoding() -> PairEncoding:
    """Return the encoding of ``TEXTS``."""
    subwords = train_subwords(TEXTS, (), SubwordConfig(vocab_size=300))
    return PairEncoding(SIDE, 3, (0.5,) * 3, (0.5,) * 3, text=TextEncoding(subwords, max_tokens=12))


def captioner(**changed: Any) -> ImageCaptioner:
    """Return an untrained captioner that knows its encoding, as one of a checkpoint does."""
    torch.manual_seed(0)
    sizes = {"image_size": SIDE, "vocab_size": encoding().text.vocab_size, "max_tokens": encoding().text.max_tokens}
    arguments = {"vit": VIT, "transformer": DECODER, "moe": MOE, **sizes, **changed}
    module = ImageCaptioner(**arguments)
    module.adopt_encoding({"encoding": encoding().state()})
    return module


def images(*names: str) -> torch.Tensor:
    """Return plain images of these colours as the model reads them, (B, 3, SIDE, SIDE)."""
    colour_BC = torch.tensor([COLOURS[name] for name in names])
    return (2 * colour_BC - 1)[:, :, None, None].expand(-1, -1, SIDE, SIDE).contiguous()


def pairs(*rows: tuple[str, str], numbers: list[int] | None = None) -> PairBatch:
    """Return a batch of colours with texts; equal colours are one image."""
    names, texts = zip(*rows, strict=True)
    of_image = [list(COLOURS).index(name) for name in names]
    known = list(dict.fromkeys(texts))
    return PairBatch(
        images(*names),
        encoding().text.encode(texts),
        torch.tensor(of_image),
        torch.tensor([known.index(text) for text in texts]),
        torch.zeros(len(rows), 0, dtype=torch.int64),
        torch.tensor(numbers or list(range(len(rows)))),
    )
