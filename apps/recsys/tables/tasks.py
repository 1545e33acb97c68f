"""Task heads: from the shared layer's output of each task to its predictions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import core
from apps.recsys.encoding.features import Target
from apps.recsys.kinds import Outputs
from core.fields import Checked, Count, CountOrZero, NotNegative, OneOf, ShareBelowOne
from core.kernels import ACTIVATIONS


@core.register_config
@dataclass(frozen=True)
class HeadConfig(Checked):
    """The towers of the tasks, and how one task depends on another.

    - "plain": a tower and a logit a task.
    - "esmm": each task is a step that implies the steps before it, as a click, then a conversion (arXiv 1804.07931).
      The towers say the chance of a step given the one before; the logits, losses and metrics cover all steps so far,
      ``p(ctcvr) = p(ctr) p(cvr)`` over all examples, those without a click too.
    - "aitm": steps too (arXiv 2105.08489): a task's knowledge passes on to the next one, which attends to it and to its
      own. A hinge keeps a step's probability below the probability of the step before.

    With "esmm" and "aitm" a step that has no label is 0 if an earlier step is 0, in losses and in metrics: nothing was
    bought where nothing was clicked, whether a table writes it or leaves it out.

    Attributes:
        kind: "plain", "esmm" or "aitm".
        hidden_dims: widths of a tower's layers; empty: a logit straight from the shared layer.
        activation: "relu", "gelu" or "silu".
        norm: norm in the towers: "batch", "layer" or None. Under "batch" a batch of one takes the running statistics.
        dropout: dropout in the towers.
        prior_bias: whether the outputs start at the best constant prediction, such as the share of positives.
        calibrator_weight: weight of AITM's hinge, ``mean of max(p_next - p_before, 0)``; only "aitm" reads it.
        steps: whether the tasks of "plain" are steps too, whose labels are filled in likewise.
        personal: embedded columns, such as the user and the item, by which gates scale the input of each layer of the
            towers (PPNet, arXiv 2302.01115), together with the domain and the shared layer's input; empty: no gates.
        gate_dim: width of the hidden layer of each of these gates.
        domain_dim: width of the hidden layer of a small network whose output is added to the logits, from the domain
            and the shared layer's input (the auxiliary network of STAR, arXiv 2101.11427); 0: none.

    Raises:
        ValueError: a value out of its range.
    """

    prefix = "head."

    kind: Literal["plain", "esmm", "aitm"] = "plain"
    hidden_dims: tuple[Count, ...] = (8,)
    activation: Annotated[str, OneOf(*ACTIVATIONS)] = "relu"
    norm: Literal["batch", "layer"] | None = None
    dropout: ShareBelowOne = 0.0
    prior_bias: bool = True
    calibrator_weight: NotNegative = 0.6
    steps: bool = False
    personal: tuple[str, ...] = ()
    gate_dim: Count = 32
    domain_dim: CountOrZero = 0

    def tower(self) -> core.MLP:
        """Return the config of a tower without its logit."""
        return core.MLP(self.hidden_dims, self.activation, self.norm, self.dropout)

    @property
    def has_steps(self) -> bool:
        """Tell whether each task implies those before it."""
        return self.steps or self.kind != "plain"

    def build(self, dim: int, num_tasks: int, positives: Sequence[float] = (), targets: Sequence[Target] = ()) -> Head:
        """Return the head for (t, B, ``dim``).

        Args:
            dim: width of the shared layer's output.
            num_tasks: number t of tasks.
            positives: share of positive labels of each task; empty if unknown.
            targets: the target of each task; empty: all are binary.

        Raises:
            ValueError: a single task with "esmm" or "aitm", or steps that are not all binary.
        """
        for target in targets:
            if self.has_steps and target.kind != "binary":
                steps = "steps=True" if self.kind == "plain" else f"kind={self.kind!r}"
                raise ValueError(f"head.{steps} takes tasks of kind 'binary', and one is {target.kind!r}")
        if self.kind != "plain" and num_tasks < 2:
            raise ValueError(f"head.kind={self.kind!r} needs at least 2 tasks, there is {num_tasks}")
        kind = {"plain": Head, "esmm": ESMM, "aitm": AITM}[self.kind]
        shares = over_all(positives) if self.has_steps else positives
        return kind(self, dim, num_tasks, of_each_step(shares) if self.kind == "esmm" else shares, targets)


class Head(nn.Module):
    """The plain head: t towers as one batched product, then the outputs of each task.

    Args:
        config: config of the towers.
        dim, num_tasks, targets: arguments of ``HeadConfig.build``.
        shares: share of positives of each output in training; empty if unknown.

    Attributes:
        outputs: the positions of each task's outputs.
    """

    def __init__(
        self,
        config: HeadConfig,
        dim: int,
        num_tasks: int,
        shares: Sequence[float] = (),
        targets: Sequence[Target] = (),
    ) -> None:
        super().__init__()
        self.config, self.num_tasks = config, num_tasks
        self.outputs = Outputs(targets or (Target(),) * num_tasks)
        self.towers = self._make_towers(dim)
        widths = [kind.width for kind in self.outputs.kinds]
        # Tasks with fewer outputs than another leave the rest of their columns unused, so that all are one product.
        self.weight, self.bias = linear_init(num_tasks, (dim, *config.hidden_dims)[-1], max(widths))
        if config.prior_bias and shares:
            with torch.no_grad():
                for t, (kind, share) in enumerate(zip(self.outputs.kinds, shares, strict=True)):
                    self.bias[t, 0, : kind.width] = torch.tensor(kind.start(share), dtype=torch.float64)

    def _make_towers(self, dim: int) -> nn.Module | None:
        """Return the towers, one network a task, or one a task and layer where gates come between the layers."""
        config = self.config
        if not config.hidden_dims:
            return None
        if not config.personal:
            return config.tower().build(self.num_tasks, dim)
        layers = (dataclasses.replace(config.tower(), hidden_dims=(width,)) for width in config.hidden_dims)
        return nn.ModuleList(
            layer.build(self.num_tasks, width) for layer, width in zip(layers, self.widths(dim), strict=False)
        )

    def widths(self, dim: int) -> tuple[int, ...]:
        """Return the widths of the inputs of the towers' layers, with the logit's layer last."""
        return (dim, *self.config.hidden_dims)

    def forward(self, x_tBD: Tensor, gates: Sequence[Tensor] = (), shift_BZ: Tensor | None = None) -> Tensor:
        """Return the outputs (B, Z) of (t, B, D), one logit per task if all are binary.

        Args:
            x_tBD: the shared layer's output of each task.
            gates: (t, B, width) factors of the input of each layer of the towers, where ``config.personal`` asks for
                them.
            shift_BZ: (B, Z), the shift that the network of ``config.domain_dim`` adds to the logits.
        """
        each = (1,) * self.num_tasks
        if gates:
            layers = self.towers if isinstance(self.towers, nn.ModuleList) else ()
            for layer, gate_tBD in zip(layers, gates[:-1], strict=True):
                x_tBD = layer(x_tBD * gate_tBD, "each", each).transpose(0, 1)
            x_tBD = x_tBD * gates[-1]
        elif self.towers is not None:
            x_tBD = self.towers(x_tBD, "each", each).transpose(0, 1)
        z_tBW = torch.baddbmm(self.bias, x_tBD, self.weight)
        if self.outputs.all_binary:
            z_BZ = z_tBW.squeeze(-1).t()
        else:
            parts = zip(z_tBW, self.outputs.kinds, strict=True)
            z_BZ = torch.cat([z_BW[:, : kind.width] for z_BW, kind in parts], dim=1)
        return z_BZ if shift_BZ is None else z_BZ + shift_BZ

    def losses(self, logits_Bt: Tensor) -> Mapping[str, Tensor]:
        """Return the head's own weighted losses by name, () each."""
        return {}

    def labels(self, label_Bt: Tensor) -> Tensor:
        """Return the labels (B, t) as the losses and metrics take them; NaN for none."""
        return step_labels(label_Bt) if self.config.has_steps else label_Bt

    def check_labels(self, label_Bt: Tensor, names: Sequence[str]) -> None:
        """Reject labels, as ``labels`` gives them, that contradict "esmm" or "aitm". It waits for the device.

        Raises:
            ValueError: an example has a step and not the one before; the message names the two tasks.
        """
        if self.config.kind == "plain":
            return
        bad = (label_Bt[:, 1:] > label_Bt[:, :-1]).any(0).nonzero()  # NaN is not greater
        if len(bad):
            before, after = names[int(bad[0])], names[int(bad[0]) + 1]
            raise ValueError(
                f"an example has {after!r} and not {before!r}: with head.kind={self.config.kind!r} the tasks are "
                "steps, in the order of the data, and each implies the one before"
            )


def step_labels(label_Bt: Tensor) -> Tensor:
    """Return labels (B, t) of steps in which a NaN is 0 if an earlier step is 0."""
    ended_Bt = (label_Bt == 0).cumsum(1) > 0
    return label_Bt.masked_fill(ended_Bt & label_Bt.isnan(), 0.0)


def over_all(positives: Sequence[float]) -> list[float]:
    """Return the shares of positives over all examples, (t,).

    A step cannot have more positives than the one before: a share that says so counts only the examples that came so
    far.
    """
    shares, before = [], 1.0
    for p in positives:
        before = p if p <= before else p * before
        shares.append(before)
    return shares


def of_each_step(shares: Sequence[float]) -> list[float]:
    """Return the share of each step given the one before, of shares over all examples."""
    return [p / b if b > 0 else p for p, b in zip(shares, (1.0, *shares), strict=False)]


class ESMM(Head):
    """Entire-space multi-task model (arXiv 1804.07931): see ``HeadConfig``."""

    def forward(self, x_tBD: Tensor, gates: Sequence[Tensor] = (), shift_BZ: Tensor | None = None) -> Tensor:
        step_tB = super().forward(x_tBD, gates, shift_BZ).t()
        so_far = [step_tB[0]]
        for z_B in step_tB[1:]:
            so_far.append(and_logit(so_far[-1], z_B))
        return torch.stack(so_far, dim=1)


def and_logit(a: Tensor, b: Tensor) -> Tensor:
    """Return the logit of ``sigmoid(a) sigmoid(b)``, exact where a product of float32 probabilities is 0 or 1.

    ``1 / (p q) = (1 + e^-a)(1 + e^-b)``, so ``pq / (1 - pq) = 1 / (e^-a + e^-b + e^-(a+b))``.
    """
    return -torch.logsumexp(torch.stack((-a, -b, -a - b)), dim=0)


class AITM(Head):
    """Adaptive information transfer multi-task (arXiv 2105.08489): see ``HeadConfig``.

    For task t with its own information ``q_t`` (the shared layer's output) and what task t - 1 passes on,
    ``p_t = relu(W z_(t-1) + b)``: ``z_t = sum over u in (p_t, q_t) of w_u v(u)``,
    ``w_u = softmax(<k(u), s(u)> / sqrt(D))``, where v, k and s are linear; ``z_1 = q_1``. The towers read z.
    """

    def __init__(self, config: HeadConfig, dim: int, num_tasks: int, *of_tasks: Any) -> None:
        super().__init__(config, dim, num_tasks, *of_tasks)
        num_transfers = num_tasks - 1
        self.transfer_weight, self.transfer_bias = linear_init(num_transfers, dim, dim)
        self.attention_weight, _ = linear_init(num_transfers, dim, 3 * dim)

    def forward(self, x_tBD: Tensor, gates: Sequence[Tensor] = (), shift_BZ: Tensor | None = None) -> Tensor:
        z_BD = x_tBD[0]
        z_tBD = [z_BD]
        for t in range(1, self.num_tasks):
            p_BD = F.relu(torch.addmm(self.transfer_bias[t - 1], z_BD, self.transfer_weight[t - 1]))
            u_B2D = torch.stack((p_BD, x_tBD[t]), dim=1)
            v, k, s = (u_B2D @ self.attention_weight[t - 1]).chunk(3, dim=-1)
            w_B2 = ((k * s).sum(-1) / math.sqrt(v.shape[-1])).softmax(-1)
            z_BD = (w_B2.unsqueeze(-1) * v).sum(1)
            z_tBD.append(z_BD)
        return super().forward(torch.stack(z_tBD), gates, shift_BZ)

    def losses(self, logits_Bt: Tensor) -> Mapping[str, Tensor]:
        if not self.config.calibrator_weight:
            return {}
        p_Bt = logits_Bt.sigmoid()
        hinge = F.relu(p_Bt[:, 1:] - p_Bt[:, :-1]).sum(1).mean()
        return {"calibrator": self.config.calibrator_weight * hinge}


def linear_init(num: int, fan_in: int, fan_out: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Return a weight (num, in, out) and a bias (num, 1, out) that start as ``nn.Linear`` does."""
    bound = 1 / math.sqrt(fan_in)
    weight, bias = torch.empty(num, fan_in, fan_out), torch.empty(num, 1, fan_out)
    return nn.Parameter(weight.uniform_(-bound, bound)), nn.Parameter(bias.uniform_(-bound, bound))
