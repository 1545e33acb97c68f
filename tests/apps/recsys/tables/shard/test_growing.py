"""A training that begins with a checkpoint's weights, on data with values that the checkpoint's data lacked."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from own_table import CONFIG, TRAIN, config_of, write
from quiet_trainer import quiet_trainer
from refusals import refused

import apps
import core
from apps.cli import main
from apps.recsys.schema import SequenceConfig
from apps.recsys.tables.columns.embedding import EmbeddingConfig
from apps.recsys.tables.module import MultiTaskRecommender

pytestmark = pytest.mark.filterwarnings("ignore")

# Of the new values "Bern" comes twice and "Lima" once; "w" is a new tag, and "it" a new shop.
MORE = {
    **TRAIN,
    "city": ["Bern", "Rome", "Lima", "Oslo", "Bern", "NA"],
    "tags": ["x|w", "", "y", "w", "y|z", "w"],
    "shop": ["de", "it", "de", "it", "fr", "de"],
    "age": ["1", "2", "3", "4", "5", "6"],
}
OLD = {
    "city": ["Rome", "NA", "Oslo", ""], "tags": ["x|y", "", "z", "y"], "user": [1, 2, 3, 77],
    "age": [10.0, None, 30.0, 50.0], "shop": ["de", "fr", "fr", "de"],
}  # fmt: skip
UNSEEN = {**OLD, "city": ["Bern", "Lima", "Rome", "Bern"], "tags": ["w", "x|w", "", "y"]}

KINDS = {
    "joined": EmbeddingConfig(dim=4, init_std=0.3),
    "fused": EmbeddingConfig("fused", dim=4, init_std=0.3),
    "collection": EmbeddingConfig("collection", dim=4, dims={"city": 6}, init_std=0.3),
}


def model_of(data, embedding, members=1):
    shared = core.MMoE(2, core.MLP((4,)))
    return MultiTaskRecommender(data.features, shared, embedding, num_members=members, report=None)


def trained(data, folder, embedding, members=1):
    torch.manual_seed(0)
    model = model_of(data, embedding, members)
    trainer = quiet_trainer(folder, max_steps=3)
    trainer.fit(model, datamodule=data)
    with torch.no_grad():  # so that row 0 and the domains have numbers of their own
        for member in model.members:
            for table in member.sparse.tables().values():
                table[0] = 0.25
            member.shared.router.domain.weight.copy_(torch.tensor([[1.0], [3.0]]))
    trainer.save_checkpoint(folder / "it.ckpt")
    return torch.load(folder / "it.ckpt", weights_only=True)


def grown(own, checkpoint, embedding, members=1):
    data = own()
    data.extend(checkpoint["encoding"])
    torch.manual_seed(1)
    model = model_of(data, embedding, members)
    wide = model.widened(checkpoint, data.encoding_state)
    model.on_load_checkpoint(wide)
    model.load_state_dict(wide["state_dict"])
    return data, model


@pytest.mark.parametrize("kind", list(KINDS))
def test_new_values_get_the_rows_after_the_old_ones_and_no_prediction_changes(own, tmp_path, kind):
    members = 2 if kind == "joined" else 1
    first = own()
    checkpoint = trained(first, tmp_path, KINDS[kind], members)
    before = MultiTaskRecommender.load_from_checkpoint(tmp_path / "it.ckpt")
    write(tmp_path, train=MORE)
    data, model = grown(own, checkpoint, KINDS[kind], members)
    assert data.vocabulary("city") == (None, "Rome", "NA", "Oslo", "Bern", "Lima")
    assert (data.vocabulary("tags"), data.domain_values) == ((*first.vocabulary("tags"), "w"), ("de", "fr", "it"))
    assert data.features.continuous == first.features.continuous  # the means and bins of the first table
    assert data.findings.added == {"domain shop": 1, "column city": 2, "column tags": 1}
    for rows in (OLD, UNSEEN):
        for task, expected in before.predict(rows).items():
            assert np.array_equal(model.predict(rows)[task], expected), task
    tables = model.members[-1].sparse.tables()
    assert torch.equal(tables["city"][4:], torch.full((2, tables["city"].shape[1]), 0.25))
    assert model.members[-1].shared.router.domain.weight[:, 0].tolist() == [1.0, 3.0, 2.0]
    # The row of a user is by a hash, and stays as it was.
    assert torch.equal(tables["user"], before.members[-1].sparse.tables()["user"])


def test_only_values_that_are_frequent_enough_get_a_row(own, tmp_path):
    state = own().encoding_state
    write(tmp_path, train={**MORE, "shop": TRAIN["shop"]})
    data = own(replace(CONFIG, min_count=2))
    data.extend(state)
    assert data.vocabulary("city") == (None, "Rome", "NA", "Oslo", "Bern")
    assert data.rows("train")[:].single_FB[0].tolist() == [4, 1, 0, 3, 4, 2]
    # The grown encoding is adopted as any other.
    again = own(replace(CONFIG, min_count=2))
    again.adopt(data.encoding_state)
    assert again.encoding == data.encoding


def test_without_new_values_a_checkpoint_has_only_the_profiles_of_the_new_rows(own, tmp_path):
    data = own()
    checkpoint = trained(data, tmp_path, KINDS["joined"])
    write(tmp_path, train={**TRAIN, "city": ["Rome", "Oslo", "NA", "Oslo", "", "Oslo"]})
    same = own()
    same.extend(checkpoint["encoding"])
    assert same.encoding == data.encoding
    wide = model_of(same, KINDS["joined"]).widened(checkpoint, same.encoding_state)
    assert wide["state_dict"] is checkpoint["state_dict"]
    city, now = (own["encoding"]["profiles"]["city"] for own in (checkpoint, wide))
    assert dict(zip(city["rows"], city["shares"], strict=False)) == {1: 0.6, 2: 0.2, 3: 0.2}  # Rome, NA, Oslo
    assert dict(zip(now["rows"], now["shares"], strict=False)) == {1: 0.2, 2: 0.2, 3: 0.6}


def test_the_table_of_a_sequence_grows(own, tmp_path):
    config = config_of(sequences={"tags": SequenceConfig(length=3)})
    first = own(config)
    old = model_of(first, KINDS["joined"])
    write(tmp_path, train=MORE)
    checkpoint = {"encoding": first.encoding_state, "state_dict": old.state_dict()}
    data, model = grown(lambda: own(config), checkpoint, KINDS["joined"])
    assert [f.num_rows for f in (*first.features.sequences, *data.features.sequences)] == [4, 5]
    tags, before = model.members[0].sparse.tables()["tags"], old.members[0].sparse.tables()["tags"]
    assert torch.equal(tags, before[[0, 1, 2, 3, 0]])
    assert model(data.rows("train")[:]).shape == (6, 1)


def test_the_fused_optimizer_keeps_its_state_of_old_rows(own, tmp_path):
    checkpoint = trained(own(), tmp_path, KINDS["fused"])
    old = checkpoint["fused_embeddings"][0]["table_city.weight"]
    write(tmp_path, train=MORE)
    _, model = grown(own, checkpoint, KINDS["fused"])
    for name, value in model.members[0].sparse.fused_state()["table_city.weight"].items():
        if value.ndim:
            assert value.abs().sum() > 0
            assert torch.equal(value[: len(old[name])], old[name])
            assert not value[len(old[name]) :].any()


def test_what_cannot_grow_is_named(own, tmp_path):
    first = own()
    state = first.encoding_state

    def cannot_grow(message, **arguments):
        data = own()
        data.extend(state)
        old, new = (MultiTaskRecommender(d.features, report=None, **arguments) for d in (first, data))
        refused(message, lambda: new.widened({"encoding": state, "state_dict": old.state_dict()}, data.encoding_state))

    # 6 * 4^(1/4) = 8.5 is 12 wide, and 6 * 22^(1/4) = 13.0 is 16.
    many = {column: values * 3 for column, values in TRAIN.items()}
    write(tmp_path, train={**many, "city": [f"c{i}" for i in range(18)]})
    cannot_grow(
        r"^column 'city' has 22 rows now, which would make its embedding 16 wide by .*, and it is 12 wide in the",
        embedding=EmbeddingConfig("collection", dim=16, by_cardinality=True),
    )
    write(tmp_path, train=MORE)
    cannot_grow(
        "^column 'shop' has the new domain 'it', and the model cannot be given a part for it: only the gates'",
        shared=core.PLE(1, core.MLP((4,)), num_task_experts=1, num_domain_experts=1),
    )


SHOP = """
model:
  class_path: MultiTaskRecommender
  init_args: {report: null, shared: {class_path: core.MMoE, init_args: {num_experts: 2}}}
data:
  class_path: TableData
  init_args:
    dataset: table
    train_file: FILE
    table: {categorical: [city], continuous: [age], tasks: {click: {column: clicked}}}
trainer: {max_epochs: 1, accelerator: cpu}
"""


def test_the_command_line_fits_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = {"age": list(range(200)), "clicked": [1, 0, 0, 1, 0] * 40}
    for name, cities in (("old", ["Rome", "Oslo", "", "Oslo"]), ("new", ["Bern", "Rome", "Oslo", "Bern"])):
        pa.csv.write_csv(pa.table({"city": cities * 50, **rows}), f"{name}.csv")
        (tmp_path / f"{name}.yaml").write_text(SHOP.replace("FILE", f"{name}.csv"))
    assert main(["fit", "--config", "old.yaml"]) == 0
    assert main(["fit", "--config", "new.yaml", "--weights", "runs/old", "--run_dir", "runs/more"]) == 0
    assert "column city: new values: 1" in capsys.readouterr().err
    before, after = apps.load("runs/old"), apps.load("runs/more")
    assert [model.features.categorical[0].num_rows for model in (before, after)] == [3, 4]
    assert after.features.continuous == before.features.continuous
    new = {"city": ["Bern", "Wien"], "age": [1, 1]}
    known, unknown = after.predict(new)["probability_click"]
    assert known != unknown
    # A run that goes on keeps the rows.
    assert main(["fit", "--config", "new.yaml", "--run_dir", "runs/more", "--ckpt_path", "last",
                 "--trainer.max_epochs", "2"]) == 0  # fmt: skip
    assert apps.load("runs/more").features == after.features
