"""DenseArch: continuous columns as numbers, bins and piecewise-linear encodings; values that are missing."""

import math
from dataclasses import replace

import pytest
import torch
from made_table import AGE, FLAT
from torch.testing import assert_close

from apps.recsys.encoding.features import ContinuousFeature
from apps.recsys.tables.columns.dense import DenseArch, DenseConfig, thin

NAN, INF = math.nan, math.inf
HOURS = ContinuousFeature("hours", mean=5.0, std=2.0, quantiles=(5.0,))
ALL = [DenseConfig(), DenseConfig(log1p=True), DenseConfig("quantile"), DenseConfig("piecewise_linear")]
ALL += [
    DenseConfig("piecewise_linear", dim=3), DenseConfig("quantile_normal"), DenseConfig("quantile_normal", num_bins=3),
    DenseConfig("by_label", dim=2),
]  # fmt: skip


def column(*values):
    return torch.tensor(values)[:, None]


def test_normalize_by_hand_within_bounds():
    # Age: mean 40, std 10, missing values in training: (50 - 40) / 10 = 1. Hours has none: no indicator.
    arch = DenseArch((AGE, HOURS))
    x_BD = arch(torch.tensor([[50.0, 9.0], [NAN, NAN], [INF, 1.0], [-INF, 5.0]]))
    assert x_BD.tolist() == [[1.0, 2.0, 0.0], [0.0, 0.0, 1.0], [0.0, -2.0, 1.0], [0.0, 0.0, 1.0]]
    assert arch.out_dim == 3
    # 10^9 is 10^8 deviations off: taken as 100.
    assert DenseArch((AGE,))(column(1e9))[0, 0] == 100.0
    # z = -2, 0, 3: -log 3, 0, log 4.
    got = DenseArch((HOURS,), DenseConfig(log1p=True))(column(1.0, 5.0, 11.0))
    assert_close(got, column(-math.log(3), 0.0, math.log(4)))


def test_quantile_normal_by_hand_with_numbered_bins_too():
    # Boundaries 20, 30, 50 are the quartiles: -0.6745, 0, 0.6745. 40 lies half between the last two.
    # z = (40 - 40) / 10; 90: z = 5, and 3 + log(1 + 2) beyond the knee; 200 is taken as the most, 110: 3 + log(5).
    age = replace(AGE, least=10.0, most=110.0)
    end = 0.6744898
    got = DenseArch((age, FLAT), DenseConfig("quantile_normal"))(
        torch.tensor([[40.0, 3.0], [90.0, 4.0], [200.0, 3.0], [0.0, 3.0], [NAN, NAN], [INF, 3.0]])
    )
    expected = [
        [end / 2, 0.0, 0.0, 0.0, 0.0],
        [end, 0.0, 3 + math.log(3), 1.0, 0.0],
        [end, 0.0, 3 + math.log(5), 0.0, 0.0],
        [-end, 0.0, -3.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 1.0],
        [0.0, 0.0, 0.0, 0.0, 1.0],
    ]
    assert_close(got, torch.tensor(expected))
    arch = DenseArch((AGE, FLAT), DenseConfig("quantile_normal", num_bins=4))
    rows = torch.tensor([[20.0, 3.0], [30.5, NAN], [NAN, 3.0]])
    assert [(f.name, f.num_rows) for f in arch.bin_features] == [("age", 5), ("flat", 2)]
    assert arch.bins(rows).tolist() == [[1, 3, 0], [1, 0, 1]]
    assert torch.equal(arch(rows), DenseArch((AGE, FLAT), DenseConfig("quantile_normal"))(rows))


def test_bins_end_with_their_boundaries_of_which_the_outermost_are_kept():
    # Boundaries 20, 30, 50: bins up to 20, 30, 50 and above, rows 1 to 4; row 0 is missing.
    arch = DenseArch((AGE, FLAT), DenseConfig("quantile"))
    bins_CB = arch.bins(torch.tensor([[20.0, 3.0], [20.5, NAN], [30.0, 3.0], [51.0, 3.0], [NAN, 3.0], [-INF, 3.0]]))
    assert bins_CB.tolist() == [[1, 2, 2, 4, 0, 0], [1, 0, 1, 1, 1, 1]]
    assert [(f.name, f.num_rows) for f in arch.bin_features] == [("age", 5), ("flat", 2)]
    assert arch(torch.zeros(1, 2)) is None
    assert (thin((0.0, 1.0, 2.0, 3.0, 4.0), 4), thin((0.0, 1.0), 8)) == ((0.0, 2.0, 4.0), (0.0, 1.0))
    assert thin((0.0, 1.0, 2.0), 2) == (0.0,)
    assert thin((1.0, 1.0 + 1e-12), None) == (1.0,)  # one number in float32
    assert thin((), 4) == ()
    arch = DenseArch((), DenseConfig("quantile"))
    assert arch(torch.zeros(2, 0)) is None
    assert arch.bins(torch.zeros(2, 0)) is None


def test_the_piecewise_linear_encoding_of_the_paper_its_tails_and_columns_without_bins():
    # Bins 20-30 and 30-50. 25: half of the first. 40: all of it, half of the second.
    # 10: (20 - 10) / 10 = 1 below: log 2. 80: (80 - 50) / 10 = 3 above: log 4. Last column: missing.
    arch = DenseArch((AGE,), DenseConfig("piecewise_linear"))
    got = arch(column(25.0, 40.0, 10.0, 80.0, NAN, INF))
    expected = [
        [0.5, 0.0, 0.0, 0.0, 0.0],
        [1.0, 0.5, 0.0, 0.0, 0.0],
        [0.0, 0.0, math.log(2), 0.0, 0.0],
        [1.0, 1.0, 0.0, math.log(4), 0.0],
        [0.0, 0.0, 0.0, 0.0, 1.0],
        [0.0, 0.0, 0.0, 0.0, 1.0],
    ]
    assert_close(got, torch.tensor(expected))
    # One boundary at 5: the tails alone, (5 - 1) / 2 = 2 below. The constant column says nothing.
    got = DenseArch((HOURS, FLAT), DenseConfig("piecewise_linear"))(torch.tensor([[1.0, 3.0], [5.0, 7.0]]))
    assert_close(got, torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]))


def test_by_label_is_the_bins_or_the_interpolation_of_the_thresholds():
    # Thresholds 30 and 45 of values from 10 to 80: the bins' boundaries, or the inner ones of the interpolation.
    own = replace(AGE, thresholds=(30.0, 45.0), least=10.0, most=80.0)
    values = torch.tensor([[9.0, 3.0], [30.0, 3.0], [31.0, NAN], [60.0, 4.0], [NAN, 3.0], [INF, 3.0]])
    got = DenseArch((own, FLAT), DenseConfig("by_label"), numbers="bins")
    assert got.bins(values).tolist() == [[1, 1, 2, 3, 0, 0], [1, 1, 0, 1, 1, 1]]
    assert [(f.name, f.num_rows) for f in got.bin_features] == [("age", 4), ("flat", 2)]
    normal = DenseConfig("quantile_normal")
    assert torch.equal(got(values), DenseArch((own, FLAT), normal)(values))
    assert DenseArch((own,), normal, numbers="bins").bins(values) is None  # other kinds do not read them
    torch.manual_seed(0)
    got = DenseArch((own, FLAT), DenseConfig("by_label"), numbers="linear")
    torch.manual_seed(0)
    same = DenseArch((replace(own, quantiles=(10.0, 30.0, 45.0, 80.0)), FLAT), DenseConfig("piecewise_linear", dim=16))
    assert (got.bins(values), got.out_dim) == (None, 5 + 32)
    assert torch.equal(got(values), torch.cat((DenseArch((own, FLAT), normal)(values), same(values)), dim=1))
    assert DenseArch((own,), DenseConfig("by_label", dim=4), numbers="linear").out_dim == 3 + 4
    with pytest.raises(ValueError, match=r"^dense.kind='by_label' needs thresholds: give table.numbers"):
        DenseArch((own,), DenseConfig("by_label"))
    assert DenseArch((), DenseConfig("by_label")).out_dim == 0  # a table without numbers needs none


def test_the_interpolation_equals_the_encoding_times_the_weights():
    torch.manual_seed(0)
    columns = (AGE, HOURS, FLAT, ContinuousFeature("z", 0.0, 1.0, (-1.0, 0.0, 0.5, 2.0), 0.2))
    arch = DenseArch(columns, DenseConfig("piecewise_linear", dim=3)).double()
    values = torch.tensor([-1e9, -1.0, 0.0, 0.2, 2.0, 5.0, 20.0, 29.0, 30.0, 49.0, 51.0, 1e9, NAN, INF, -INF])
    dense_BC = values.double()[:, None].expand(-1, 4)
    with torch.no_grad():
        arch.encode.tails_weight.normal_()
    start, expected = 0, []
    for c, f in enumerate(columns):
        # The encoding of one column at a time, an indicator always there.
        indicated = ContinuousFeature(f.name, f.mean, f.std, f.quantiles, missing=0.1)
        code_BR = DenseArch((indicated,), DenseConfig("piecewise_linear")).double()(dense_BC[:, c : c + 1])
        bins = max(len(f.quantiles) - 1, 0)
        tails = arch.encode.tails_weight[:, c] if f.quantiles else arch.encode.tails_weight[2:, c]
        weight_Rd = torch.cat((arch.encode.weight[start : start + bins], tails))
        expected.append((code_BR @ weight_Rd + arch.encode.bias[c]).relu())
        start += bins
    assert_close(arch(dense_BC), torch.cat(expected, dim=1))


@pytest.mark.parametrize("config", ALL, ids=lambda c: f"{c.kind}-{c.log1p}-{c.dim}")
@pytest.mark.parametrize("copies", [1, 2])
def test_any_number_gives_finite_outputs_and_gradients(config, copies):
    arch = DenseArch((AGE, FLAT), config, copies, "linear")
    big = 3.4e38
    dense_BC = torch.tensor([[NAN, NAN], [INF, -INF], [-INF, INF], [big, -big], [-big, big], [0.0, -0.0]])
    y = arch(dense_BC)
    if y is None:
        assert (arch.bins(dense_BC) >= 0).all()
        return
    assert y.shape == ((6, arch.out_dim) if copies == 1 else (2, 6, arch.out_dim))
    assert y.isfinite().all()
    if list(arch.parameters()):
        y.sum().backward()
        assert all(p.grad.isfinite().all() for p in arch.parameters())


def test_copies_have_weights_of_their_own_and_a_missing_value_starts_without_effect():
    arch = DenseArch((AGE, HOURS), DenseConfig("piecewise_linear", dim=2), copies=2)
    with torch.no_grad():
        for p in arch.parameters():
            p.zero_()
        arch.encode.bias.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]))
    # Copy 0: the first two of each column.
    assert arch(torch.zeros(1, 2))[:, 0].tolist() == [[1.0, 2.0, 5.0, 6.0], [3.0, 4.0, 7.0, 8.0]]
    arch = DenseArch((HOURS,), DenseConfig("piecewise_linear", dim=4))
    assert_close(arch(column(NAN)), arch.encode.bias.relu())
