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


def test_heat_map_has_a_row_a_class_and_a_column_an_expert():
    share = {"block 1": np.array([[0.75, 0.25], [0.0, 1.0], [0.5, 0.5]])}
    axis, bar = plots.expert_class_heatmap(share, ["cat", "dog", "owl"]).axes
    assert axis.images[0].get_array().tolist() == [[75, 25], [0, 100], [50, 50]]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["cat", "dog", "owl"]
    assert [t.get_text() for t in axis.texts] == ["75", "25", "0", "100", "50", "50"]
    assert bar.get_ylabel() == "share of the class's tokens, %"


def test_heat_map_of_many_classes_keeps_the_most_specialised():
    share = np.full((50, 2), 0.5)
    share[[7, 30]] = [[1.0, 0.0], [0.0, 1.0]]
    fig = plots.expert_class_heatmap({"block 1": share}, [f"class {i}" for i in range(50)], max_classes=2)
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["class 7", "class 30"]
    assert "the 2 most specialised of 50 classes" in fig.get_suptitle()


def test_load_bars_are_shares_and_say_how_uneven_they_are():
    axis = plots.load_bars({"block 1": np.array([30, 10, 0, 0])}, {"block 1": 0.125}).axes[0]
    assert [b.get_height() for b in axis.patches] == [75.0, 25.0, 0.0, 0.0]
    assert axis.get_title() == "block 1\nmax/mean 3.00, dropped 12 %"
    assert axis.lines[0].get_ydata()[0] == 25.0


def test_patches_have_the_colour_and_number_of_their_expert():
    ids = np.array([[[0, 1], [2, 3]]])  # of 3 experts: no expert computed the last patch
    fig = plots.routing_over_images(np.zeros((1, 4, 4)), {"block 1": ids}, 3, ["zero"])
    plain, tinted = fig.axes
    assert plain.get_ylabel() == "zero"
    assert (plain.get_title(), tinted.get_title()) == ("image", "block 1")
    rgba = tinted.images[1].get_array()
    assert rgba.shape == (2, 2, 4)
    assert list(rgba[0, 0, :3]) == pytest.approx([0x00 / 255, 0x72 / 255, 0xB2 / 255])
    assert rgba[1, 1, 3] == 0.0
    assert [t.get_text() for t in tinted.texts] == ["0", "1", "2", "\N{MULTIPLICATION SIGN}"]
    # The middle of the upper left patch of 2x2 pixels, whose pixels 0 and 1 span -0.5 .. 1.5.
    assert tinted.texts[0].get_position() == (0.5, 0.5)
    assert [t.get_text() for t in fig.legends[0].get_texts()][-1].endswith("none")


def test_expert_colours_differ():
    for num_experts in (2, 8, 9, 64):
        assert len(set(plots.expert_colors(num_experts))) == num_experts


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.routing_over_images(np.zeros((1, 4, 4)), {}, 3), "needs at least one layer"),
        (
            lambda: plots.routing_over_images(np.zeros((1, 4, 4)), {"a": np.zeros((2, 2, 2), int)}, 3),
            "of 'a' have shape",
        ),
        (
            lambda: plots.expert_class_heatmap({"a": np.zeros((2, 3))}, ["one"]),
            r"'a' has shape \(2, 3\), not \(1 classes",
        ),
        (lambda: plots.load_bars({}), "needs at least one layer"),
        (lambda: plots.quality_against_flops([]), "needs at least one point"),
        (lambda: plots.Series("a", [1.0], [0.5, 0.6]), "'a': flops, quality and interval differ in length"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


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


def test_a_flat_file_is_smaller_and_keeps_the_ends_of_the_colours(tmp_path):
    share = {"block 1": np.linspace(0, 1, 160).reshape(10, 16)}
    fig = plots.expert_class_heatmap(share, [f"class {i}" for i in range(10)])
    whole, flat = (plots.save_picture(fig, tmp_path / f"{flat}.png", flat=flat) for flat in (False, True))
    assert flat.stat().st_size < 0.6 * whole.stat().st_size
    a, b = (imread(path)[..., :3] for path in (whole, flat))
    assert np.abs(a - b).max() < 0.05
