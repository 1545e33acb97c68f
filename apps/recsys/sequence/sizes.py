"""A next-item model without data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from apps.task import Missing, Sizes, Trial, ids_on_meta, vocabulary_loss


class Sized:
    @classmethod
    def data_arguments(cls, given: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
        if "num_items" not in given:
            raise Missing("the number of items comes from the data: give --model.num_items N")
        return {} if "max_length" in given else {"max_length": sizes.option("max_length") or 200}

    @classmethod
    def trial(cls, model: Any, sizes: Sizes, dtype: torch.dtype) -> Trial:
        length = min(sizes.length or model.max_length, model.max_length)
        batch = sizes.examples(length)
        loss = vocabulary_loss(batch * length, model.model.output_weight, dtype)
        return Trial(lambda: model.model.encode(ids_on_meta(batch, length)), batch, batch * length, loss, "items")
