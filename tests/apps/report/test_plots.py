"""Pictures: what is drawn from which array, and that a file is whole or not there."""

import numpy as np
import pytest
from matplotlib.image import imread

from apps.report import plots


def test_quality_against_flops_scales_axes_and_keeps_every_point():
    series = [
        plots.Series("sparse", [2e6, 4e6], [0.5, 0.75], connected=True),
        plots.Series("dense", [3e6], [0.6], interval=[0.05]),
    ]
    axis = plots.quality_against_flops(series).axes[0]
    lines = {c.get_label(): c.lines[0] for c in axis.containers}
    assert lines["sparse"].get_xdata().tolist() == [2.0, 4.0]  # MFLOPs
    assert lines["sparse"].get_ydata().tolist() == [50.0, 75.0]  # %
    assert lines["sparse"].get_linestyle() == "-"
    assert lines["dense"].get_linestyle() == "None"
    assert axis.get_xlabel() == "MFLOPs an example, forward"
    low, high = axis.containers[1].lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((55.0, 65.0))


def test_wide_ranges_are_logarithmic():
    axis = plots.quality_against_flops([plots.Series("a", [1e6, 1e9], [0.5, 0.6])]).axes[0]
    assert axis.get_xscale() == "log"


def test_load_bars_are_shares_and_say_how_uneven_they_are():
    axis = plots.load_bars({"block 1": np.array([30, 10, 0, 0])}, {"block 1": 0.125}).axes[0]
    assert [b.get_height() for b in axis.patches] == [75.0, 25.0, 0.0, 0.0]
    assert axis.get_title() == "block 1\nmax/mean 3.00, dropped 12 %"
    assert axis.lines[0].get_ydata()[0] == 25.0
    assert [t.get_text() for t in axis.get_xticklabels()] == ["0", "1", "2", "3"]
    named = plots.load_bars({"block 1": np.array([1, 1])}, names={"block 1": ("shared 0", "own")}).axes[0]
    assert [t.get_text() for t in named.get_xticklabels()] == ["shared 0", "own"]


def test_expert_colours_differ():
    for num_experts in (2, 8, 9, 64):
        assert len(set(plots.expert_colors(num_experts))) == num_experts


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    fig = plots.load_bars({"block 1": np.array([1, 2])})
    path = plots.save_picture(fig, tmp_path / "new" / "load.png")
    assert imread(path).ndim == 3
    assert [p.name for p in path.parent.iterdir()] == ["load.png"]
    before = path.read_bytes()

    def full(file, **kwargs):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(fig, "savefig", full)
    with pytest.raises(OSError, match="no space"):
        plots.save_picture(fig, path)
    assert [p.name for p in path.parent.iterdir()] == ["load.png"]
    assert path.read_bytes() == before
