"""Feed-forward networks as the code of well-known models has them, written anew: each is read by what it computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from core import FFN, GeneralFFN, MoEConfig, SwiGLU, TokenChoice, sparsify
from core.convert.read import structure
from core.convert.read.trial import run

D, H = 8, 12
ONE_OF_ONE = MoEConfig(1, TokenChoice(1, normalize="unit"))


class NanoGPT(nn.Module):
    def __init__(self, dropout=0.1, bias=False):
        super().__init__()
        self.c_fc = nn.Linear(D, H, bias=bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(H, D, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Llama(nn.Module):
    """Llama's and torchtitan's: ``w1`` is the gate, and ``w3`` is multiplied."""

    def __init__(self, gate="w1"):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(a, b, bias=False) for a, b in ((D, H), (H, D), (D, H)))
        self.gate = gate

    def forward(self, x):
        gate, up = (self.w1(x), self.w3(x)) if self.gate == "w1" else (self.w3(x), self.w1(x))
        return self.w2(F.silu(gate) * up)


class BertIntermediate(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(D, H)

    def forward(self, x):
        return F.gelu(self.dense(x))


class BertOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.dropout, self.norm = nn.Linear(H, D), nn.Dropout(0.2), nn.LayerNorm(D)

    def forward(self, hidden, x):
        return self.norm(self.dropout(self.dense(hidden)) + x)


class Bert(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, dropout=0.1, batch_first=True)
        self.inner, self.outer = BertIntermediate(), BertOutput()

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.outer(self.inner(x), x)


class T5Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.wi_0, self.wi_1 = nn.Linear(D, H, bias=False), nn.Linear(D, H, bias=False)
        self.wo, self.dropout, self.act = nn.Linear(H, D, bias=False), nn.Dropout(0.1), nn.GELU(approximate="tanh")

    def forward(self, x):
        x = self.act(self.wi_0(x)) * self.wi_1(x)
        return self.wo(self.dropout(x))


class TimmMlp(nn.Module):
    def __init__(self, drop=(0.1, 0.2)):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(D, H), nn.GELU(), nn.Dropout(drop[0])
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(H, D), nn.Dropout(drop[1])

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class TorchvisionMLPBlock(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Linear(D, H), nn.GELU(), nn.Dropout(0.1, inplace=True), nn.Linear(H, D), nn.Dropout(0.2, inplace=True)
        )


class Swin(nn.Module):
    """One dropout is called twice."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2, self.drop = nn.Linear(D, H), nn.GELU(), nn.Linear(H, D), nn.Dropout(0.1)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class ConvNeXt(nn.Module):
    """A whole block: depthwise convolution, norm, network, layer scale and residual."""

    def __init__(self):
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(D, D, 3, padding=1, groups=D), nn.LayerNorm(D)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)
        self.gamma = nn.Parameter(1e-6 * torch.ones(D))

    def forward(self, x):
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class MlpMixer(nn.Module):
    def __init__(self, tokens=5):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.token_mixing = nn.Sequential(nn.Linear(tokens, H), nn.GELU(), nn.Linear(H, tokens))
        self.channel_mixing = nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D))

    def forward(self, x):
        x = x + self.token_mixing(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mixing(self.norm2(x))


class DiT(nn.Module):
    """A network whose input is scaled and shifted by a condition, which it is not given."""

    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(D, elementwise_affine=False), TimmMlp((0.0, 0.0))
        self.mlp.act = nn.GELU(approximate="tanh")
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 3 * D))

    def forward(self, x):
        shift, scale, gate = self.modulation(x.mean(1, keepdim=True)).chunk(3, -1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class SASRec(nn.Module):
    """Two convolutions over single positions, with dropout before the activation, and the residual inside."""

    def __init__(self):
        super().__init__()
        self.conv1, self.dropout1, self.relu = nn.Conv1d(D, H, kernel_size=1), nn.Dropout(0.1), nn.ReLU()
        self.conv2, self.dropout2 = nn.Conv1d(H, D, kernel_size=1), nn.Dropout(0.2)

    def forward(self, x):
        y = self.dropout2(self.conv2(self.relu(self.dropout1(self.conv1(x.transpose(-1, -2))))))
        return y.transpose(-1, -2) + x


class PreNorm(nn.Sequential):
    def __init__(self):
        super().__init__(nn.LayerNorm(D), nn.Linear(D, H), nn.GELU(), nn.Dropout(0.1), nn.Linear(H, D), nn.Dropout(0.2))


class Network(nn.Module):
    """Two blocks with a residual, between an embedding and a head."""

    def __init__(self, make, channels_first=False):
        super().__init__()
        self.embed, self.head = nn.Linear(3, D), nn.Linear(D, 2)
        self.blocks = nn.ModuleList([make(), make()])
        self.channels_first = channels_first

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + (block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if self.channels_first else block(x))
        return self.head(x)


T5 = GeneralFFN(H, "gelu_tanh", gated=True, bias_in=False, bias_out=False, dropout=0.1)
ARCHITECTURES = [
    (NanoGPT, "blocks.*", FFN(H)),
    (Llama, "blocks.*", SwiGLU(H)),
    (lambda: Llama("w3"), "blocks.*", SwiGLU(H)),
    (Bert, "blocks.*", FFN(H, bias=True)),
    (T5Gated, "blocks.*", T5),
    (TimmMlp, "blocks.*", GeneralFFN(H, dropout=0.1)),
    (TorchvisionMLPBlock, "blocks.*", GeneralFFN(H, dropout=0.1)),
    (Swin, "blocks.*", GeneralFFN(H, dropout=0.1)),
    (ConvNeXt, "blocks.*", FFN(H, bias=True)),
    (MlpMixer, "blocks.*.token_mixing", FFN(H, bias=True)),
    (MlpMixer, "blocks.*.channel_mixing", FFN(H, bias=True)),
    (DiT, "blocks.*.mlp", FFN(H, "gelu_tanh", bias=True)),
    (SASRec, "blocks.*", GeneralFFN(H, "relu", dropout=0.1)),
    (PreNorm, "blocks.*", GeneralFFN(H, dropout=0.1)),
]


@pytest.mark.parametrize(("make", "modules", "expert"), ARCHITECTURES)
def test_the_network_of_an_architecture_becomes_experts(make, modules, expert):
    torch.manual_seed(0)
    dense, is_map = Network(make, make is ConvNeXt).double(), make is ConvNeXt
    sparse = sparsify(dense, ONE_OF_ONE, modules)
    x = torch.randn(2, 5, 4, 3).double() if is_map else torch.randn(2, 5, 3).double()
    layers = [module for module in sparse.modules() if hasattr(module, "moe")]
    assert [layer.config.expert for layer in layers] == [expert] * 2
    # ``run`` makes dropout a function, so that a dropout that is lost or moved is a difference in training.
    for training in (False, True):
        expected, y = run(dense, x, training).y, run(sparse, x, training).y
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
        assert training or torch.equal(dense(x), expected)


def test_modules_alike_are_read_once(monkeypatch):
    torch.manual_seed(0)
    read, reading = [], structure._reading
    monkeypatch.setattr(structure, "_reading", lambda module: read.append(module) or reading(module))
    # The third differs in an attribute alone, the fourth in a size.
    dense = nn.Sequential(Llama(), Llama(), Llama("w3"), Llama()).double()
    dense[3].w1, dense[3].w2, dense[3].w3 = (nn.Linear(a, b).double() for a, b in ((D, 7), (7, D), (D, 7)))
    sparse, x = sparsify(dense, ONE_OF_ONE, "*"), torch.randn(5, D).double()
    assert read == [dense[0], dense[2], dense[3]]
    torch.testing.assert_close(sparse(x), dense(x))
