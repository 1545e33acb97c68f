"""What ``VisionClassifier`` is compared with: dense networks of equal cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch

import core
from apps.equal_cost.comparison import Baseline, Comparison, ExampleValues, RoutedLayers, adopted_twins, dense_twins
from apps.nets.place import Place
from apps.train.step.module import TaskOutput
from apps.vision.conv import ConvConfig, ConvNet
from apps.vision.model import ViTConfig
from core.convert import SparseFFN


class VisionComparison(Comparison):
    """A ``VisionClassifier`` as a comparison sees it."""

    @property
    def tokens_per_image(self) -> int:
        """Number of patches, class and register tokens; the positions of the last sparse group."""
        if isinstance(self.module.model, ConvNet):
            return self.module.model.conv.grid(self.module.image_size, (self.module.model.moe_blocks or (-1,))[-1]) ** 2
        return self.module.model.patch_embed.num_patches + self.module.model.num_prefix_tokens

    @property
    def _around(self) -> ViTConfig | ConvConfig:
        return self.module.conv or self.module.vit or ViTConfig()

    def baselines(self) -> Mapping[str, Baseline]:
        """Return dense models of equal active FLOPs and of equal parameters, whose FFNs replace the experts."""
        if self.module.backbone is not None:
            dense = self.module.twin(moe=None).model
            return adopted_twins(dense, self.module.model, self._twin_of_timm) if core.moe_layers(self.module) else {}
        return dense_twins(self, self._around.dense_ffn)

    def _twin_of_timm(self, cost: Literal["flops", "params"]) -> Callable[[], Any]:
        return partial(self.module.twin, backbone=replace(self.module.backbone, twin=cost))

    @property
    def moe_block_names(self) -> tuple[str, ...]:
        # The layer of a backbone lies in the place of its MLP, which a twin has there.
        return tuple(name.removesuffix(".moe") for name in super().moe_block_names)

    def routed_layers(self) -> RoutedLayers | None:
        if self.module.moe is None:
            return None
        if self.module.backbone is not None:
            return self._routed_layers_of_timm()
        arguments = {"tokens_per_sequence": self.tokens_per_image}
        place = Place(type(self.module).__name__, ("token_ids_BS",))
        sharing = len(self.module.model.moe_blocks) if self.module.model.shares_experts else 1
        return RoutedLayers(self.module.moe, self._around.dim, place, arguments, sharing)

    def _routed_layers_of_timm(self) -> RoutedLayers | None:
        layers = [module for module in self.module.modules() if isinstance(module, SparseFFN)]
        if not layers or any((layer.config, layer.dim) != (layers[0].config, layers[0].dim) for layer in layers):
            return None
        lengths, trains = list[int](), self.module.training
        with layers[0].moe.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1])), torch.no_grad():
            self.module.eval()(
                torch.zeros(
                    1, self.module.in_chans, self.module.image_size, self.module.image_size, device=self.module.device
                )
            )
        self.module.train(trains)
        place = Place(type(self.module).__name__, ())  # timm's networks hand their MLPs no context
        return RoutedLayers(layers[0].config, layers[0].dim, place, {"tokens_per_sequence": lengths[0]})

    def example_values(self, outs: Sequence[TaskOutput]) -> ExampleValues:
        """Return the top-1 accuracy: 1 for an image whose likeliest class is its own, else 0."""
        right = [(out.outputs.argmax(-1) == out.targets).double() for out in outs]
        return ExampleValues("top1", torch.cat(right).cpu())


COMPARISON = VisionComparison
