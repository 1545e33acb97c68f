"""Gates that learn nothing: hashes, random experts, random experts of a domain; and the consistency loss."""

import math

import pytest
import torch
from routed import ids
from torch import Tensor

from core import FFN, MoEConfig, RoutingContext
from core.routing.balance.consistency import consistency_loss
from core.routing.given.clusters import assign_equally, balanced_clusters
from core.routing.given.fixed import DomainRandom, Hash, Random, balanced_table, random_table


def by_id(tokens: list[list[int]], domains: list[int] | None = None, valid: Tensor | None = None) -> RoutingContext:
    domain_ids_B = None if domains is None else torch.tensor(domains)
    return RoutingContext(valid, token_ids_BS=torch.tensor(tokens), domain_ids_B=domain_ids_B)


def load(table: Tensor, num_experts: int, counts: Tensor | None = None) -> list[float]:
    """Tokens of each expert, where id ``v`` occurs ``counts[v]`` times."""
    counts = torch.ones(len(table)) if counts is None else counts.float()
    return torch.bincount(table[:, 0], counts, minlength=num_experts).tolist()


def test_a_hash_is_its_table_at_gate_1():
    built = Hash(4).build(6, 3)
    built.table.copy_(torch.tensor([[2], [0], [0], [1]]))
    routing = built(torch.randn(1, 5, 6), by_id([[3, 0, 0, 2, 1]]))
    assert (ids(routing), routing.gates_N.tolist()) == ([[1], [2], [2], [0], [0]], [1.0] * 5)
    assert routing.tokens_per_expert_E.tolist() == [2, 1, 2]
    assert routing.evidence.scores_TE is None
    # A token keeps its expert whatever is around it.
    built = Hash(50).build(6, 8)
    alone = built(torch.randn(1, 1, 6), by_id([[17]])).expert_ids_N
    among = built(torch.randn(2, 3, 6), by_id([[1, 17, 2], [3, 4, 17]])).expert_ids_N
    assert among[1] == among[5] == alone[0]


def test_a_hash_with_learned_gates_takes_the_tables_experts_at_their_scores():
    built = Hash(2, top_k=2, score_func="sqrt_softplus", scale=1.5).build(3, 3)
    built.table.copy_(torch.tensor([[2, 0], [1, 2]]))
    built.gate.weight.data.copy_(torch.eye(3))
    # Logits log(e^s^2 - 1) have the scores s: 1, 3, 2. Experts 2 and 0: 1.5 * 2/3 and 1.5 * 1/3; 1 and 2: 3/5, 2/5.
    x = torch.tensor([[[math.log(math.exp(s * s) - 1) for s in (1.0, 3.0, 2.0)]] * 2]).squeeze(0)[None]
    routing = built(x, by_id([[0, 1]]))
    assert (ids(routing), routing.gates_N.tolist()) == ([[2, 0], [1, 2]], pytest.approx([1.0, 0.5, 0.9, 0.6]))
    assert routing.evidence.scores_TE[0].tolist() == pytest.approx([1, 3, 2])
    assert Hash(2, score_func="sigmoid").num_params(6, 4) == 24
    # One expert's gate is its score, for a gate of 1 would learn nothing.
    one = Hash(2, score_func="sigmoid").build(3, 3)
    one.table.fill_(1)
    one.gate.weight.data.copy_(torch.eye(3))
    assert one(torch.tensor([[[0.0, 1.0, 5.0]]]), by_id([[0]])).gates_N.item() == pytest.approx(0.731059)


def test_a_random_table_is_uniform_its_columns_differ_and_the_seed_says_it():
    table = random_table(20_000, 5, 3, seed=1)
    assert table.shape == (20_000, 3)
    for column in table.T:
        # 4000 expected of each; 4 sigma of a binomial of 0.2 is 226.
        assert torch.bincount(column, minlength=5).sub(4000).abs().max() < 226
    assert (table.sort(-1).values.diff(dim=-1) > 0).all()
    # Every one of the 10 pairs of the first two: 2000 expected, 4 sigma of a binomial of 0.1 is 170.
    pairs = table[:, :2].sort(-1).values
    assert torch.bincount(pairs[:, 0] * 5 + pairs[:, 1]).sub(2000).abs().le(170).sum() == 10
    one, same, other = (Hash(100, seed=seed).build(6, 8).table for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    state = torch.random.get_rng_state()
    Hash(100).build(6, 8)
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing else is drawn from


def test_a_balanced_hash_gives_each_expert_as_many_ids_and_deals_frequent_ones_first_to_the_emptiest():
    for vocab_size, sizes in ((12, [3.0] * 4), (14, [3.0, 3.0, 4.0, 4.0])):
        table = Hash(vocab_size, "balanced").build(6, 4).table
        assert sorted(load(table, 4)) == sizes
        assert not torch.equal(table, Hash(vocab_size, "balanced", seed=1).build(6, 4).table)
    # 9 to expert 0; 5 to 1; 4 to 1 (5 < 9); then 9 : 9, and fewer ids: 3 to 0; 2 to 1 (9 < 12); 0 to 1 (11 < 12).
    table = balanced_table([2.0, 9.0, 4.0, 0.0, 5.0, 3.0], 2, 1, seed=0)
    assert table.flatten().tolist() == [1, 0, 1, 1, 1, 0]
    # Ids that never occur are spread too.
    assert sorted(load(balanced_table([5.0, 5.0] + [0.0] * 8, 2, 1, seed=0), 2)) == [5.0, 5.0]


def test_a_balanced_hash_balances_the_tokens_it_was_fitted_to_and_its_several_experts_are_different():
    counts = (10_000 / torch.arange(1, 2001)).round()  # Zipf's law
    built = Hash(2000, "balanced").build(6, 8)
    before = load(built.table, 8, counts)
    built.fit(counts)
    after, mean = load(built.table, 8, counts), float(counts.sum() / 8)
    assert max(after) - min(after) <= 5  # the last ids occur 5 times: any gap is filled up to one of them
    assert max(before) > 1.2 * mean
    tokens = torch.arange(2000).repeat_interleave(counts.long())
    routing = built(torch.zeros(1, len(tokens), 6), RoutingContext(token_ids_BS=tokens[None]))
    assert routing.chosen_per_expert_E.tolist() == after
    built = Hash(60, "balanced", top_k=2).build(6, 5)
    assert (built.table[:, 0] != built.table[:, 1]).all()
    assert torch.bincount(built.table.flatten(), minlength=5).tolist() == [24] * 5
    routing = built(torch.randn(1, 3, 6), by_id([[0, 1, 59]]))
    assert (routing.gates_N.tolist(), ids(routing)) == ([0.5] * 6, built.table[[0, 1, 59]].tolist())


def test_clusters_keep_like_points_together_and_have_equal_sizes():
    # Three tight groups of 4, far apart.
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points, order = centers.repeat_interleave(4, 0) + 0.1 * torch.randn(12, 2), torch.randperm(12)
    cluster_N = min(
        (balanced_clusters(points[order], 3, seed=s) for s in range(5)), key=lambda c: spread(points[order], c)
    )
    groups = [sorted((order[cluster_N == c] // 4).tolist()) for c in range(3)]
    assert sorted(groups) == [[0] * 4, [1] * 4, [2] * 4]


def spread(points: Tensor, clusters: Tensor) -> float:
    return sum(float((points[clusters == c] - points[clusters == c].mean(0)).square().sum()) for c in clusters.unique())


def test_cluster_sizes_differ_by_at_most_one_and_a_full_cluster_keeps_the_nearest_points():
    for num_points, sizes in ((12, [4, 4, 4]), (13, [4, 4, 5]), (14, [4, 5, 5]), (3, [1, 1, 1])):
        for points in (torch.randn(num_points, 2), torch.zeros(num_points, 2)):
            assert sorted(torch.bincount(balanced_clusters(points, 3), minlength=3).tolist()) == sizes
    # All but 9 are nearest to center 0, which has room for two of four: 2.9 goes on to center 9.
    points, centers = torch.tensor([[2.9], [0.0], [0.1], [9.0]]), torch.tensor([[0.0], [9.0]])
    assert assign_equally(points, centers).tolist() == [1, 0, 0, 1]
    # Clusters are better than chance.
    points = torch.randn(200, 3)
    assert spread(points, balanced_clusters(points, 8)) < 0.6 * spread(points, torch.arange(200) % 8)


def test_a_clustered_hash_is_made_from_embeddings_and_not_used_before():
    built = Hash(20, "clustered").build(6, 4)
    x, given = torch.randn(1, 20, 6), by_id([list(range(20))])
    with pytest.raises(ValueError, match=r"call router.fit_clusters\(embeddings\) first"):
        built(x, given)
    embeddings = torch.randn(20, 3)
    built.fit_clusters(embeddings)
    routing = built(x, given)
    assert torch.equal(routing.expert_ids_N, balanced_clusters(embeddings, 4))
    assert routing.tokens_per_expert_E.tolist() == [5] * 4
    other, third = (Hash(20, "clustered").build(6, 4) for _ in range(2))
    other.load_state_dict(built.state_dict())
    third.table.copy_(built.table)
    for copied in (other, third):
        assert torch.equal(copied(x, given).expert_ids_N, routing.expert_ids_N)
    built.reset_parameters()
    with pytest.raises(ValueError, match="has no table yet"):
        built(x, given)


def test_there_is_nothing_to_train_or_to_balance_and_tables_are_buffers_of_the_state_dict():
    for config in (Hash(50, seed=1), DomainRandom(2, 50, seed=1), Random()):
        built = config.build(6, 4)
        assert not list(built.parameters())
        assert config.num_params(6, 4) == config.flops_per_token(6, 4) == 0
        assert config.terms == frozenset()
        if not isinstance(config, Random):
            other = type(config)(**{**vars(config), "seed": 2}).build(6, 4)
            assert not torch.equal(built.table, other.table)
            other.load_state_dict(built.state_dict())
            assert torch.equal(built.table, other.table)


@pytest.mark.parametrize("top_k", [1, 3])
def test_random_experts_are_uniform_and_different(top_k):
    routing = Random(top_k).build(6, 4).train()(torch.randn(4, 2000, 6))
    # 2000 K of 8000 tokens expected; 4 sigma of a binomial of K / 4 is 155.
    assert routing.chosen_per_expert_E.sub(2000 * top_k).abs().max() < 155
    assert routing.gates_N.unique().tolist() == pytest.approx([1 / top_k])
    chosen = torch.tensor(ids(routing)).sort(-1).values
    assert (chosen.diff(dim=-1) > 0).all()


def test_random_experts_are_drawn_once_a_token_a_sequence_or_a_batch_in_training_alone():
    x = torch.randn(32, 16, 6)
    for per, different in (("token", 3), ("sequence", 1), ("batch", 1)):
        chosen_BS = Random(1, per).build(6, 8).train()(x).expert_ids_N.unflatten(0, (32, 16))
        assert max(len(row.unique()) for row in chosen_BS) >= different
        if per != "token":
            assert all(len(row.unique()) == 1 for row in chosen_BS)
        assert (len(chosen_BS.unique()) == 1) == (per == "batch")
    built = Random(2).build(6, 8)
    assert not torch.equal(built.train()(x).expert_ids_N, built(x).expert_ids_N)
    assert torch.equal(built.eval()(x).expert_ids_N, built(x).expert_ids_N)


def test_evaluation_takes_the_experts_in_turn_by_position_or_the_mean_of_all():
    routing = Random(2).build(6, 3).eval()(torch.randn(2, 4, 6))
    assert ids(routing) == [[0, 1], [2, 0], [1, 2], [0, 1]] * 2
    # 16 pairs over 3 experts, each sequence 3, 3, 2.
    assert routing.tokens_per_expert_E.tolist() == [6, 6, 4]
    for top_k, length in ((1, 8), (2, 6), (3, 7), (1, 3)):
        counts = Random(top_k).build(6, 4).eval()(torch.randn(1, length, 6)).tokens_per_expert_E
        assert counts.sum() == length * top_k
        assert counts.max() - counts.min() <= 1
    layer = MoEConfig(3, Random(evaluation="average"), FFN(8)).build(6).eval()
    x, experts = torch.randn(2, 5, 6), layer.experts
    alone = [torch.nn.functional.gelu(x @ experts.w_in[e]) @ experts.w_out[e] for e in range(3)]
    torch.testing.assert_close(layer(x), sum(alone) / 3, rtol=1e-5, atol=1e-6)
    assert (layer.router(x).tokens_per_expert_E.tolist(), layer.train().router(x).top_k) == ([10] * 3, 1)


def test_a_domain_has_its_own_experts_and_its_own_map():
    built = DomainRandom(2, 6).build(6, 4)
    built.table.copy_(torch.tensor([[0, 1, 0, 1, 1, 0], [3, 3, 2, 2, 3, 2]]))
    routing = built(torch.randn(2, 3, 6), by_id([[0, 1, 5], [0, 1, 5]], [1, 0]))
    assert (ids(routing), routing.gates_N.tolist()) == ([[3], [3], [2], [0], [1], [0]], [1.0] * 6)
    for vocab_size in (30, 32):  # the ids are shared out evenly within the group of a domain
        table = DomainRandom(3, vocab_size).build(6, 12).table
        for domain, row in enumerate(table):
            group = torch.bincount(row, minlength=12)[4 * domain : 4 * domain + 4]
            assert int(group.sum()) == vocab_size
            assert int(group.max() - group.min()) <= 1
        assert not torch.equal(table[0], table[1] - 4)


def test_consistency_is_the_symmetric_divergence():
    a, b = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.8, 0.2]).log()
    # KL(a || b) = 0.5 log(0.5 / 0.8) + 0.5 log(0.5 / 0.2) = 0.223144,
    # KL(b || a) = 0.8 log(0.8 / 0.5) + 0.2 log(0.2 / 0.5) = 0.192745; half their sum: 0.207944.
    assert consistency_loss(a, b).item() == pytest.approx(0.207944, abs=1e-6)
    assert consistency_loss(b, a).item() == pytest.approx(0.207944, abs=1e-6)
    assert consistency_loss(a, a + 3).item() == pytest.approx(0.0, abs=1e-7)  # logits are equal up to a constant
    # The mean over two predictions, one of them consistent.
    assert consistency_loss(torch.stack((a, a)), torch.stack((b, a))).item() == pytest.approx(0.103972, abs=1e-6)
    # Padding is left out.
    a, b = (torch.randn(2, 3, 5, requires_grad=True) for _ in range(2))
    valid = torch.tensor([[True, True, False], [True, False, False]])
    dirty = b.masked_fill(~valid[..., None], torch.nan)
    loss = consistency_loss(a, dirty, valid)
    assert loss.item() == pytest.approx(consistency_loss(a[valid], b[valid]).item())
    loss.backward()
    assert a.grad[~valid].abs().max() == 0
    assert b.grad.isfinite().all()
    assert consistency_loss(a, dirty, torch.zeros_like(valid)).item() == 0
    a, b = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    kl, log_a, log_b = torch.nn.functional.kl_div, a.log_softmax(-1), b.log_softmax(-1)
    both = [kl(log_b, log_a, log_target=True, reduction="sum"), kl(log_a, log_b, log_target=True, reduction="sum")]
    torch.testing.assert_close(consistency_loss(a, b), sum(both) / 8)
    assert torch.autograd.gradcheck(consistency_loss, (a, b))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Hash(5, scale=2.0), r"scale=2.0 is a factor on learned gates, and score_func is None"),
        (lambda: Hash(5, "clustered", top_k=2), r"top_k=2 is not 1, and a token is in one cluster"),
        (lambda: Hash(5, top_k=5).build(6, 4), r"top_k=5 exceeds num_experts=4"),
        (lambda: Hash(3, "clustered").build(6, 4), r"num_experts=4 clusters exceed vocab_size=3"),
        (lambda: Hash(3).build(6, 4).fit([1, 2, 3]), r"fit makes a table of kind='balanced', .* kind='random'"),
        (lambda: Hash(3, "balanced").build(6, 4).fit([1, 2]), r"2 counts are not one for each of vocab_size=3"),
        (lambda: Hash(2, "balanced").build(6, 4).fit([1, -2]), r"a count is negative or not finite"),
        (lambda: Hash(2).build(6, 2).fit_clusters(torch.zeros(2, 1)), r"fit_clusters makes a table of kind='clust"),
        (lambda: Hash(2, "clustered").build(6, 2).fit_clusters(torch.zeros(3, 1)), r"embeddings of shape \(3, 1\) are"),
        (lambda: Hash(2, "clustered").build(6, 2).fit_clusters(torch.full((2, 1), math.inf)), "point .* is not fin"),
        (lambda: balanced_clusters(torch.zeros(2, 1), 3), r"num_clusters=3 is not between 1 and 2 points"),
        (lambda: Random(5).build(6, 4), r"top_k=5 exceeds num_experts=4"),
        (lambda: DomainRandom(3, 5).build(6, 4), r"num_domains=3 does not divide num_experts=4"),
    ],
)
def test_a_wrong_option_is_refused_with_its_value_and_the_rule(make, message):
    with pytest.raises(ValueError, match=message):
        make()
