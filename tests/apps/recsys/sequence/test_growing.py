"""A training of histories that begins with a checkpoint's weights, and has further items."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.csv
import pytest
import torch

from apps.recsys.sequence.data import HistoryData
from apps.recsys.sequence.histories import Items
from apps.recsys.sequence.model import HistoryModelConfig
from apps.recsys.sequence.module import NextItemRecommender

OLD = {"user": ["u"] * 4 + ["v"] * 3, "item": ["tea", "fig", "rye", "fig", "tea", "rye", "tea"], "time": range(7)}
NEW = {
    "user": ["u"] * 5 + ["w"] * 3,
    "item": ["ale", "fig", "oat", "ale", "tea", "rye", "bun", "tea"],
    "time": range(8),
}


def data_of(folder, columns, **options):
    path = folder / "events.csv"
    pa.csv.write_csv(pa.table({name: list(values) for name, values in columns.items()}), path)
    return HistoryData("table", file=str(path), cache_dir=str(folder / "cache"), max_length=4, **options)


def model_of(data, seed):
    torch.manual_seed(seed)
    return NextItemRecommender(data.num_items, 4, HistoryModelConfig(dim=8, depth=1, num_heads=2)).eval()


@pytest.mark.parametrize(("min_count", "added"), [(1, ["ale", "bun", "oat"]), (2, ["ale"])])
def test_new_items_get_the_ids_after_the_old_ones_and_no_score_changes(tmp_path, min_count, added):
    first = data_of(tmp_path, OLD)
    before = model_of(first, 0)
    checkpoint = {"encoding": first.encoding_state, "state_dict": before.state_dict()}
    data = data_of(tmp_path, NEW, min_item_count=min_count)
    data.extend(checkpoint["encoding"])
    assert data.item_values == ("", "fig", "rye", "tea", *added)
    assert data.histories.num_unknown == (0 if min_count == 1 else 2)
    after = model_of(data, 1)
    fresh = after.model.item_embed.weight[4:].clone()
    wide = after.widened(checkpoint, data.encoding_state)
    after.load_state_dict(wide["state_dict"])
    items_BS = torch.tensor([[1, 2, 3], [3, 0, 0]])
    # Not always to the bit: a product with more items may be summed in another order.
    torch.testing.assert_close(after(items_BS)[:, :4], before(items_BS), rtol=1e-5, atol=0)
    assert torch.equal(after.model.item_embed.weight[4:], fresh)  # as the model draws them
    assert Items.from_state(wide["encoding"]) == data.encoding
    # The grown items are adopted as any others.
    again = data_of(tmp_path, NEW)
    again.adopt(data.encoding_state)
    assert again.item_values == data.item_values


def test_new_items_have_names_of_their_own(tmp_path):
    names = {"fig": "Fig", "rye": "Rye", "tea": "Tea", "ale": "Ale", "oat": "Oat", "bun": "Bun"}
    state = data_of(tmp_path, OLD | {"label": [names[i] for i in OLD["item"]]}, name_column="label").encoding_state
    new = NEW | {"label": [names[i].upper() for i in NEW["item"]]}
    data = data_of(tmp_path, new, name_column="label")
    data.extend(state)
    assert data.item_names == ("", "Fig", "Rye", "Tea", "ALE", "BUN", "OAT")
