"""TwoTowerRetriever: its loss, its ranks, its baselines, and a run through Lightning."""

import pickle
import shutil

import pytest
import torch
from made_pairs import MOE, made_pairs, retriever
from quiet_trainer import quiet_trainer
from refusals import refused
from torch.testing import assert_close

import core
from apps.compare.systems import find_systems
from apps.recsys.retrieval.loss import sampled_softmax
from apps.recsys.retrieval.module import TwoTowerRetriever
from apps.train.step.module import OptimizerConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = made_pairs(tmp_path_factory.mktemp("pairs"), user_column="user", exclude_seen=True)
    data.setup("fit")
    return data


def known(module, data):
    """Give a model what its checkpoint would keep of the data."""
    module.adopt_encoding({"encoding": data.encoding_state})
    return module.eval()


@torch.no_grad()
def test_vectors_have_the_length_1_and_the_loss_is_the_corrected_softmax_of_their_products(data):
    module = retriever(data).eval()
    batch = data.examples("train").__getitems__(range(6))
    users, items = module(*module.example_inputs(batch))
    assert_close(users.norm(dim=1), torch.ones(6))
    assert_close(items.norm(dim=1), torch.ones(4))  # of four different films
    alone = data.examples("train").__getitems__([4])
    assert_close(module(*module.example_inputs(alone))[0][0], users[4])
    batch = data.examples("train").__getitems__(range(6))
    for options in ({}, {"log_q": False}, {"temperature": 0.5, "learn_temperature": True}):
        module = retriever(data, **options).train()
        users, items = module(*module.example_inputs(batch))
        logits = users @ items.t() / options.get("temperature", 0.05)
        log_q = None if options.get("log_q") is False else batch.log_q_U
        assert_close(module.task_loss(batch).loss, sampled_softmax(logits, batch.own_B, batch.count_U, log_q))


def test_an_evaluation_leaves_unknown_items_out_and_a_learned_temperature_has_a_floor(data):
    module = known(retriever(data), data)
    with torch.no_grad():
        out = module.task_loss(data.examples("test").__getitems__([0, 1, 2]))  # the first one is not in training
        two = module.task_loss(data.examples("test").__getitems__([1, 2]))
        none = module.task_loss(data.examples("test").__getitems__([0]))
    assert_close(out.loss, two.loss)
    assert (out.targets.tolist(), float(none.loss)) == ([0, 3, 1], 0.0)
    module = retriever(data, learn_temperature=True).train()
    module.task_loss(data.examples("train").__getitems__(range(6))).loss.backward()
    assert float(module.log_temperature.grad.abs()) > 0
    with torch.no_grad():
        module.log_temperature.fill_(-9.0)
    assert float(module.temperature.detach()) == pytest.approx(0.01)
    assert "log_temperature" not in dict(retriever(data).named_parameters())


@torch.no_grad()
def test_the_ranks_are_among_the_candidates_of_the_whole_catalog(data):
    module = known(retriever(data), data)
    batch = data.examples("test").__getitems__([0, 1, 2])
    out = module.judged(batch, module.task_loss(batch), "test")
    (items,) = data.catalog.batches(data.item_features)
    scores = module.user_tower(batch.user) @ module.item_tower(items).t()
    # bob may get Casablanca and Fargo, cy Alien and Brazil; ann's film is in no catalog of 5
    bob = 1 + int(scores[1, 4] >= scores[1, 2])
    cy = 1 + int(scores[2, 1] >= scores[2, 0])
    assert out.outputs.tolist() == [6, bob, cy]


@torch.no_grad()
def test_the_index_is_made_anew_for_other_weights_and_needs_data(data):
    module = known(retriever(data), data)
    before = module.index().vectors_ID
    assert module.index() is module.index()
    state = {name: value + 0.1 for name, value in module.state_dict().items()}
    module.load_state_dict(state)
    after = module.index().vectors_ID
    assert not torch.allclose(before, after)
    for p in module.item_tower.parameters():
        p.mul_(1.5)
    module.train()
    assert not torch.allclose(module.eval().index().vectors_ID, after)
    refused("does not know what its numbers stand for", lambda: retriever(data).index())


def test_dense_towers_cost_as_much(data):
    module = retriever(data)
    batch = data.examples("train").__getitems__(range(6))
    assert len(core.moe_layers(module)) == 2
    systems = {s.name: s for s in find_systems(module, batch, None, ["switch", "hash"])}
    assert systems["dense_equal_flops"].replaced_ratio == pytest.approx(1, abs=0.05)
    assert systems["dense_equal_params"].params_ratio == pytest.approx(1, abs=0.05)
    assert systems["router_switch"].refused == ""
    assert "token_ids" in systems["router_hash"].refused
    dense = pickle.loads(pickle.dumps(module.comparison.baselines()["dense_equal_flops"].build))()
    assert not core.moe_layers(dense)
    assert (dense.comparison.baselines(), dense.ks) == ({}, (1, 3))


@pytest.mark.filterwarnings("ignore")
def test_it_learns_what_each_user_likes_and_survives_a_checkpoint(tmp_path):
    data = made_pairs(tmp_path, user_column="user", num_uniform=3)
    module = retriever(data, optimizer=OptimizerConfig(lr=0.02), ema_decay=0.5)
    trainer = quiet_trainer(tmp_path, max_epochs=20)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    predicted = module.predict({"user": ["ann", "bob", "cy"], "age": [30, 40, 50]}, top=2)
    liked = {"ann": {"Alien", "Brazil"}, "bob": {"Alien", "Dune"}, "cy": {"Dune", "Casablanca"}}
    best = {}
    for user, film in zip(predicted["user"], predicted["film"], strict=True):
        best.setdefault(user, set()).add(film)
    assert best == liked
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    assert {"test/recall_1", "test/recall_3", "test/ndcg_1", "test/mrr", "test/loss"} <= metrics.keys()
    assert module.monitor == "val/recall_3"
    assert "test/routing/user_tower.blocks.0.ffn/load_imbalance" in trainer.callback_metrics
    assert "test/routing/item_tower.blocks.0.ffn/load_imbalance" in trainer.callback_metrics
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "rated.csv").unlink()
    again = TwoTowerRetriever.load_from_checkpoint(tmp_path / "it.ckpt")
    assert list(again.predict({"user": ["ann"], "age": [30]}, top=5)["film"]) == list(
        module.predict({"user": ["ann"], "age": [30]}, top=5)["film"]
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"ks": ()}, "must be ascending numbers of at least 1"), ({"ks": (3, 1)}, r"ks=\[3, 1\] must be ascending"),
     ({"ks": (1, 5)}, r"ks=\[1, 5\]: the last must be below the 5 items"),
     ({"temperature": 0.0}, "temperature=0.0 must be positive"),
     ({"temperature": 0.001, "learn_temperature": True}, "temperature=0.001 is below 0.01"),
     ({"dense_ffn": core.DenseFFN(8)}, "is for a dense model"),
     ({"moe_blocks": [3]}, "moe_blocks index 3 is out of range for depth=1"),
     ({"moe": core.MoEConfig(4, core.Hash(vocab_size=9), MOE.expert)}, "needs context.token_ids_BS")],
)  # fmt: skip
def test_bad_options_are_refused(data, changed, message):
    described = {name: getattr(data, name) for name in TwoTowerRetriever.data_arguments}
    refused(message, lambda: TwoTowerRetriever(**{**described, "moe": MOE, "ks": (1, 3), **changed}))
