"""A captioner: the image encoder of the vision app, and a decoder as a translator has, which attends to its tokens.

The decoder's FFNs may be mixtures of experts, as in MoE-LLaVA (arXiv 2401.15947), and the encoder's as in V-MoE (arXiv
2106.05974). Unlike MoE-LLaVA, whose language model reads image tokens and words as one sequence, the decoder attends to
the image: its cache then holds only the text written so far, and the search works as in a translator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import core
from apps.base.checks import check_at_least
from apps.data.subwords import PAD_ID
from apps.nets.blocks import FFNConfig, MoEs
from apps.nets.config import TransformerConfig
from apps.nets.decode_cache import Memory
from apps.nets.expert_attention import check_rows
from apps.nets.transformer import MemoryDecoder, build_stack
from apps.vision.model import ViTConfig, VMoE
from core.kernels import cpu


class CaptionModel(MemoryDecoder):
    """An image encoder and a decoder that maps the ids of a text to the logits of the next.

    A linear map, the connector, takes the encoder's tokens to the width of the decoder.

    Args:
        vit: the encoder.
        config: the decoder; it has no layers of ``encoder_layers``. ``tie``: all but "none" tie the output to the
            embedding.
        image_size: height and width of the images in pixels.
        in_chans: channels of an image.
        vocab: V of the texts.
        ffn: FFN of the chosen blocks: an MoE layer, a list with one for each, the encoder's first, or another dense
            FFN; None: the same as in the other blocks.
        encoder_moe_blocks, decoder_moe_blocks: which blocks: "everyN", "lastN", "all", "none" or indices, as
            ``apps.nets.blocks.resolve_blocks`` has them. Without ``ffn`` they are not asked.

    Raises:
        ValueError: a value out of its range, or a combination that cannot be built.

    Example::

        model = CaptionModel(ViTConfig(), TransformerConfig("nano"), image_size=32, in_chans=3, vocab=1000)
        logits = model(image, text_BL[:, :-1])          # (B, L - 1, 1000)
    """

    def __init__(
        self,
        vit: ViTConfig,
        config: TransformerConfig,
        *,
        image_size: int,
        in_chans: int,
        vocab: int,
        ffn: FFNConfig | MoEs | None = None,
        encoder_moe_blocks: str | Sequence[int] = "none",
        decoder_moe_blocks: str | Sequence[int] = "every2",
    ) -> None:
        super().__init__()
        check_rows(config, ffn)
        check_at_least(PAD_ID + 2, vocab=vocab)
        self.config, self.vocab = config, vocab
        of_encoder, of_decoder = self._choose(ffn, encoder_moe_blocks, vit.num_blocks, decoder_moe_blocks)
        if self.encoder_moe_blocks and vit.dim != config.shape.dim:
            raise ValueError(
                f"encoder_moe_blocks={encoder_moe_blocks!r} needs one width for the experts of both stacks: vit has "
                f"dim {vit.dim} and transformer {config.shape.dim}"
            )
        self.attention_moe = None
        self.embed = nn.Embedding(vocab, config.shape.dim, padding_idx=PAD_ID)
        self.decoder = build_stack(
            config, config.shape.decoder_layers, of_decoder, self.decoder_moe_blocks, None, causal=True, cross=True
        )
        self.output = cpu.Linear(config.shape.dim, vocab, bias=False) if config.tie == "none" else None
        self.connector = cpu.Linear(vit.dim, config.shape.dim)
        self.reset_parameters()
        # After that: the encoder starts as a classifier's does.
        self.encoder = VMoE(
            vit,
            image_size=image_size,
            in_chans=in_chans,
            num_classes=0,
            ffn=_one_or_each(of_encoder),
            moe_blocks=self.encoder_moe_blocks,
        )

    @property
    def target_embedding(self) -> nn.Embedding:
        return self.embed

    def encode(self, image: Tensor) -> Memory:
        """Return the (B, S, D) tokens of (B, C, H, W) images: class and register tokens, then patches row by row."""
        # timm norms the tokens of pool="avg" after the pooling, of which there is none here.
        x_BSD = self.connector(self.encoder.fc_norm(self.encoder.forward_features(image)))
        return Memory(x_BSD, torch.ones(x_BSD.shape[:2], dtype=torch.bool, device=x_BSD.device))

    def forward(self, image: Tensor, text_BL: Tensor) -> Tensor:
        """Map (B, C, H, W) images and (B, L) ids to (B, L, V) logits of the id after each."""
        return self.logits(self.decode(text_BL, self.encode(image)))


def _one_or_each(ffns: Sequence[FFNConfig]) -> FFNConfig | MoEs | None:
    """Return the FFN of all blocks, the list of each block's, or None for no block."""
    if not ffns:
        return None
    return ffns[0] if len(set(ffns)) == 1 else [ffn for ffn in ffns if isinstance(ffn, core.MoEConfig)]
