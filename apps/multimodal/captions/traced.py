"""One image as a captioner reads and describes it: its words, the places they look at, and the experts of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import core
from apps.data.subwords import BOS_ID, EOS_ID
from apps.nlp.decode.run import dropless
from apps.nlp.text.words import words_of


@dataclass(frozen=True)
class Traced:
    """An image, a caption of it, and the passes over both.

    Attributes:
        read: L subwords that the decoder reads.
        written: L subwords that it is to say after each.
        attention: float (layers, heads, L, h, w), the decoder's attention to the image's patches.
        tape: the passes of the MoE layers.
    """

    read: tuple[str, ...]
    written: tuple[str, ...]
    attention: Tensor
    tape: core.Tape

    @property
    def of_decoder(self) -> list[Any]:
        """The tape's entries of the decoder."""
        return [entry for entry in self.tape.entries if entry.name.startswith("decoder.")]

    @property
    def of_encoder(self) -> list[Any]:
        """The tape's entries of the encoder."""
        return [entry for entry in self.tape.entries if entry.name.startswith("encoder.")]

    def looks(self) -> tuple[list[str], np.ndarray]:
        """Return the words of the caption without its end, and where each looks, (words, h, w).

        That is the mean over its subwords and over the heads of the last layer but one.
        """
        words = words_of(self.written)[:-1]
        layer_LHW = self.attention[max(len(self.attention) - 2, 0)].mean(0)
        ends = np.cumsum([len(word) for word in words]).tolist()
        places = [slice(end - len(word), end) for word, end in zip(words, ends, strict=True)]
        looks = [layer_LHW[place].mean(0).cpu().numpy() for place in places]
        return ["".join(word) for word in words], np.stack(looks) if looks else np.zeros((0, *layer_LHW.shape[1:]))


@torch.no_grad()
def traced(module: Any, image: Tensor, written: Sequence[int]) -> Traced:
    """Pass an image and a caption of it through the model.

    Args:
        module: an ``ImageCaptioner`` in evaluation.
        image: (1, C, H, W), normalized.
        written: ids of the caption, without the end.
    """
    model, subwords = module.model, module.subwords
    read_1L = torch.tensor([[BOS_ID, *written]], device=module.device)
    with dropless(model), core.record(model) as tape:  # as in the search
        attention = model.attention_to(model.encode(image.to(module.device)), read_1L)[:, 0].float()
    prefix, grid = model.encoder.num_prefix_tokens, model.encoder.patch_embed.grid_size
    return Traced(
        tuple(subwords.pieces(read_1L[0].tolist(), "source")),
        tuple(subwords.pieces([*written, EOS_ID], "source")),
        attention[..., prefix:].unflatten(-1, tuple(grid)),
        tape,
    )
