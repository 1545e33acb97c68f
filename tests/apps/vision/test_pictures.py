"""Pictures of the routing of patches: what is drawn from which array."""

from __future__ import annotations

import numpy as np
import pytest

from apps.vision.pictures import routing_over_images


def test_patches_have_the_colour_and_number_of_their_expert():
    ids = np.array([[[0, 1], [2, 3]]])  # of 3 experts: no expert computed the last patch
    fig = routing_over_images(np.zeros((1, 4, 4)), {"block 1": ids}, 3, ["zero"])
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
