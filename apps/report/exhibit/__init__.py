"""A trained model at work, as plain parts: what a user gives it, what it answers, and which experts computed that.

``moesaic demo`` makes a page of it. ``apps.task.Task.exhibit`` returns the ``Exhibit`` of a model: its fields, a
function that answers what they read, and examples of the run's data, which are left out where there are none.

The fields and the parts are plain values and functions: no library of pages is imported here or in an app.
"""

from apps.report.exhibit.fields import ChoiceField, Field, ImageField, ItemsField, NumberField, TextField
from apps.report.exhibit.parts import (
    Answer,
    Bars,
    Example,
    Exhibit,
    Gates,
    Images,
    LayerPart,
    Part,
    Patches,
    Pieces,
    Said,
)
from apps.report.exhibit.routes import expert_names, layer_names, words_by_layer

__all__ = [
    "Exhibit", "Example", "Answer",
    "Field", "ImageField", "TextField", "NumberField", "ChoiceField", "ItemsField",
    "Part", "Bars", "Said", "Images", "LayerPart", "Patches", "Pieces", "Gates",
    "words_by_layer", "layer_names", "expert_names",
]  # fmt: skip
