"""The architecture of a published configuration, in our terms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import core
from apps.base.checks import check_name
from apps.nets.config import TransformerConfig
from apps.nets.transformer import LanguageModel, TranslationModel
from apps.porting.parts import Parts
from apps.porting.vocabulary import Vocabulary
from core.layers import FeedForward

Model = TranslationModel | LanguageModel


@dataclass(frozen=True)
class Architecture:
    """A published model in our terms.

    Attributes:
        model_type: theirs.
        transformer: the configuration of our model.
        vocabulary: their ids and ours.
        moe: of the sparse layers; None: there are none.
        encoder_moe_blocks, decoder_moe_blocks: the sparse layers.
        is_language_model: it is decoder-only.
    """

    model_type: str
    transformer: TransformerConfig
    vocabulary: Vocabulary
    moe: core.MoEConfig | None = None
    encoder_moe_blocks: tuple[int, ...] = ()
    decoder_moe_blocks: tuple[int, ...] = ()
    is_language_model: bool = False

    @classmethod
    def of(cls, model: Model, model_type: str, vocabulary: Vocabulary) -> Architecture:
        """Return the architecture of one of our models.

        Raises:
            ValueError: tokens pass by some of its layers or use one again, layers share their experts, or its attention
                has experts, which none of the published ones here has.
        """
        if isinstance(model, LanguageModel) and model.depths is not None:
            raise ValueError(f"depths={model.depths}: every token enters every layer of a {model_type}")
        if isinstance(model, LanguageModel) and model.universal is not None:
            raise ValueError(f"universal={model.universal}: a {model_type} has a layer for each step of depth")
        if model.attention_moe is not None:
            raise ValueError(f"attention_moe cannot be said in {model_type}, whose heads are fixed")
        if getattr(model, "copy_gate", None) is not None:
            raise ValueError(f"copy=True cannot be said in {model_type}, which has no weights for it")
        if isinstance(model, LanguageModel) and model.shares_experts:
            raise ValueError(f"share_experts=True: every layer of a {model_type} has experts of its own")
        layers: tuple[tuple[int, ...], tuple[int, ...]]
        if isinstance(model, LanguageModel):
            layers = (), model.moe_blocks
        else:
            layers = model.encoder_moe_blocks, model.decoder_moe_blocks
        if len(model.moes) > 1:
            raise ValueError(f"moe lists {len(model.moes)} layers: published models have one for all sparse blocks")
        encoder, decoder = layers if model.moes else ((), ())
        is_language_model = isinstance(model, LanguageModel)
        moe = model.moes[0].split(model.config.shape.dim) if model.moes else None
        return cls(model_type, model.config, vocabulary, moe, encoder, decoder, is_language_model)

    def build(self) -> Model:
        """Return our model, with new weights."""
        if self.is_language_model:
            return LanguageModel(
                self.transformer,
                vocab=self.vocabulary.our_size,
                ffn=self.moe,
                moe_blocks=self.decoder_moe_blocks or "none",
            )
        return TranslationModel(
            self.transformer,
            source_vocab=self.vocabulary.our_size,
            ffn=self.moe,
            encoder_moe_blocks=self.encoder_moe_blocks or "none",
            decoder_moe_blocks=self.decoder_moe_blocks or "none",
        )

    def shapes(self) -> dict[str, torch.Size]:
        """Return our parameters' shapes by name."""
        with torch.device("meta"):
            return {name: weight.shape for name, weight in self.build().state_dict().items()}

    def options(self) -> dict[str, Any]:
        """Return the model's options as plain values, as a YAML file has them."""
        options: dict[str, Any] = {
            "transformer": asdict(self.transformer),
            "moe": None if self.moe is None else self.moe.to_dict(),
        }
        layers = {"decoder_moe_blocks": self.decoder_moe_blocks, "encoder_moe_blocks": self.encoder_moe_blocks}
        if self.is_language_model:
            layers = {"moe_blocks": self.decoder_moe_blocks}
        return {**options, **{name: list(indices) or "none" for name, indices in layers.items()}}

    def essence(self) -> dict[str, Any]:
        """Return everything except the weights that the logits depend on, by name: no dropout, capacity or balance
        loss."""
        config, shape = self.transformer, self.transformer.shape
        values = shape._asdict()
        for name in ("positions", "norm", "norm_eps", "bias", "tie", "start", "scale_embeddings", "logits_scale"):
            values[name] = getattr(config, name)
        values["qkv_bias"] = config.has_qkv_bias
        values["qk_norm"] = config.qk_norm
        values["attention_scale"] = config.score_scale
        of_positions = {
            "sinusoidal": ("position_offset",),
            "learned": ("position_offset", "max_length"),
            "rotary": ("rotary_base",),
            "relative": ("relative_buckets", "relative_max_distance"),
        }
        for name in of_positions.get(config.positions, ()):
            values[name] = getattr(config, name)
        if self.is_language_model:
            values["encoder_layers"] = 0
            values["tie"] = "none" if config.tie == "none" else "all"
        values["encoder_moe_blocks"], values["decoder_moe_blocks"] = self.encoder_moe_blocks, self.decoder_moe_blocks
        num_sparse = len(self.encoder_moe_blocks) + len(self.decoder_moe_blocks)
        if num_sparse < values["encoder_layers"] + shape.decoder_layers:
            values.update(activation=config.activation, gated=config.gated)
        else:
            del values["hidden_dim"]
        return {**values, **_essence_of_moe(self.moe, shape.dim), "vocab_size": self.vocabulary.our_size}


def as_it_is(model: Model) -> tuple[Model, dict[str, Tensor]]:
    """Return a model whose configuration says what its layers are now, and its weights. They share the model's modules.

    ``core.prune_experts``, ``core.densify`` and their like change the layers of a model, not its configuration.

    Raises:
        ValueError: layers differ in their number of experts, dense ones in their activation or gate, or no dense FFN
            computes the same as a layer of one expert.
    """
    now, weights = copy.copy(model), dict(model.state_dict())
    counts = sorted({layer.num_experts for layer in model.modules() if isinstance(layer, core.MoE)})
    ones = {name: one.feed_forward() for name, one in model.named_modules() if isinstance(one, core.OneExpert)}
    if len(model.moes) != 1 or model.attention_moe is not None:  # Architecture.of rejects them
        return now, weights
    if len(counts) > 1:
        raise ValueError(f"the MoE layers have {counts} experts: published models have one number for all")
    moe = model.moes[0].split(model.config.shape.dim)
    now.moes = tuple(replace(moe, num_experts=count) for count in counts)
    for name, ffn in ones.items():
        weights = {key: weight for key, weight in weights.items() if not key.startswith(f"{name}.")}
        weights |= {f"{name}.{key}": weight for key, weight in ffn.state_dict().items()}
    if ones:
        dense: list[Any] = [*ones.values(), *(ffn for ffn in model.modules() if isinstance(ffn, FeedForward))]
        (activation, gated), *others = sorted({(ffn.activation, ffn.w_gate is not None) for ffn in dense})
        if others:
            raise ValueError(f"dense layers have {activation!r}, gated={gated}, and others: published models have one")
        widest = max(ffn.w_in.out_features for ffn in dense)
        now.config = replace(now.config, hidden_dim=widest, activation=activation, gated=gated)
    for blocks in ("encoder_moe_blocks", "decoder_moe_blocks", "moe_blocks"):
        stack = "encoder" if blocks.startswith("encoder") else "decoder"
        if hasattr(model, blocks):
            sparse = (i for i in getattr(model, blocks) if f"{stack}.layers.{i}.ffn" not in ones)
            setattr(now, blocks, tuple(sparse))
    return now, weights


def _essence_of_moe(moe: core.MoEConfig | None, dim: int) -> dict[str, Any]:
    if moe is None:
        return {}
    router, expert = moe.router, moe.expert
    if isinstance(router, core.TokenChoice):
        # In evaluation there is no noise, and the start of the weights is past.
        router = replace(
            router,
            normalize=router.normalize if router.normalize == "unit" else router.normalizes,
            noise=None,
            noise_std=1.0,
            jitter_eps=0.0,
            second_expert_policy="always",
            bias_update_rate=1e-3,
            init_scale=0.1,
        )
    if isinstance(expert, core.FFN):
        expert = replace(expert, hidden_dim=expert.hidden(dim))
    return {
        "moe.num_experts": moe.num_experts,
        "moe.router": router,
        "moe.expert": expert,
        "moe.num_shared_experts": moe.num_shared_experts,
        "moe.shared_gate": moe.shared_gate,
        "moe.output_bias": moe.output_bias,
    }


@dataclass(frozen=True)
class Family:
    """Published models that differ only in numbers.

    Attributes:
        defaults: by ``model_type``, of dense parents and sparse models: what ``config.json`` says that our models have
            not, such as special ids.
        read: configuration and tensors to the architecture.
        write: the architecture to the values of a configuration.
        parts: the architecture to the table of its parameters.
        vocabulary: the configuration to the vocabulary, and our ``TransformerConfig.start``.
        published: tensors to the names of published files; a library may hold them in another layout.
        bias: whether plain experts have biases.
        computed: ends of the names of tensors that are not weights.
    """

    defaults: Mapping[str, Mapping[str, Any]]
    read: Callable[[Mapping[str, Any], Mapping[str, Tensor]], Architecture]
    write: Callable[[Architecture], dict[str, Any]]
    parts: Callable[[Architecture], Parts]
    vocabulary: Callable[[Mapping[str, Any]], tuple[Vocabulary, Any]]
    published: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda tensors: tensors
    bias: bool = False
    computed: tuple[str, ...] = ()

    def fit(self, architecture: Architecture, weights: dict[str, Tensor]) -> tuple[Architecture, dict[str, Tensor]]:
        """Return an architecture of the same logits that the family can say, and its weights; see ``one_width``."""
        return one_width(architecture, weights, bias=self.bias)


def one_width(
    architecture: Architecture, weights: dict[str, Tensor], *, bias: bool
) -> tuple[Architecture, dict[str, Tensor]]:
    """Make plain experts and dense FFNs as wide as the wider ones by hidden units that are zero: the logits stay. Of a
    dense model the widest FFN is ``hidden_dim`` wide.

    Args:
        architecture: of one of our models.
        weights: number of documents.
        bias: experts without biases get such of zero.
    """
    moe, shape = architecture.moe, architecture.transformer.shape
    expert: Any = None if moe is None else moe.expert
    if expert is not None and type(expert) is not core.FFN:
        return architecture, weights
    num_sparse = len(architecture.encoder_moe_blocks) + len(architecture.decoder_moe_blocks)
    own = 0 if expert is None else expert.hidden(shape.dim)
    width = own if num_sparse == shape.encoder_layers + shape.decoder_layers else max(own, shape.hidden_dim)
    out = {}
    for name, weight in weights.items():
        hidden_dim = None  # the dimension of its hidden units
        if ".ffn." in name:
            hidden_dim = {
                "experts.w_in": 2,  # (E, D, F)
                "experts.b_in": 1,
                "experts.w_out": 1,  # (E, F, D)
                "w_in.weight": 0,  # (F, D)
                "w_gate.weight": 0,
                "w_in.bias": 0,
                "w_out.weight": 1,  # (D, F)
            }.get(name.rpartition(".ffn.")[2])
        if hidden_dim is not None and weight.shape[hidden_dim] < width:
            lacking = [*weight.shape]
            lacking[hidden_dim] = width - weight.shape[hidden_dim]
            weight = torch.cat((weight, weight.new_zeros(lacking)), hidden_dim)
        out[name] = weight
        if bias and expert is not None and not expert.bias and name.endswith((".experts.w_in", ".experts.w_out")):
            out[name.replace(".w_", ".b_")] = weight.new_zeros(len(weight), weight.shape[2])
    if moe is not None:
        moe = replace(moe, expert=replace(expert, hidden_dim=width, bias=bias or expert.bias))
    return replace(architecture, transformer=replace(architecture.transformer, hidden_dim=width), moe=moe), out


def needed(config: Mapping[str, Any], name: str) -> Any:
    """Return a size that the model needs.

    Raises:
        ValueError: it is missing, or not an integer.
    """
    if config.get(name) is None:
        raise ValueError(f"config.json of a {config['model_type']} says no {name}")
    if type(config[name]) is not int:
        raise ValueError(
            f"config.json of a {config['model_type']} says {name}={config[name]!r}, which is not an integer"
        )
    return config[name]


ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
THEIR_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu"}


def activation(theirs: str) -> Any:
    """Return our name of an activation.

    Raises:
        ValueError: there is none like it here.
    """
    check_name("activation", theirs, [*ACTIVATIONS])
    return ACTIVATIONS[theirs]


def sparse_parts(moe: core.MoEConfig, model_type: str) -> tuple[core.TokenChoice, core.FFN]:
    """Return the router and the experts; gated experts have a subclass of FFN.

    Raises:
        ValueError: the published architecture has others.
    """
    if not isinstance(moe.router, core.TokenChoice):
        raise ValueError(f"router {type(moe.router).__name__} cannot be said in {model_type}, which has TokenChoice")
    if not isinstance(moe.expert, core.FFN):
        raise ValueError(f"expert {type(moe.expert).__name__} cannot be said in {model_type}, which has FFN or SwiGLU")
    return moe.router, moe.expert
