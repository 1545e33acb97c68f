"""What the routers of pairs refuse, each in one line with the value and the rule."""

import pytest

from core import (
    Balance,
    Base,
    Dense,
    DenseToSparse,
    DSelectK,
    DynamicThreshold,
    Ensemble,
    ExpertChoice,
    Hierarchical,
    MoEConfig,
    NullExperts,
    Prototypes,
    ReLURouting,
    Sinkhorn,
    SparseMixer,
    Threshold,
    TokenChoice,
    TokenRounding,
)  # fmt: skip

ONE = r"^capacity_factor=0.5 with num_experts=1 would take the earliest tokens: .* \(arXiv 2202.09368\)$"
OWN = r" does not apply to ExpertChoice \(arXiv 2202\.09368\)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenChoice(1, normalize=True), r"normalize=True with top_k=1 .* no gradient"),
        (lambda: TokenChoice(3, second_expert_policy="random"), r"second_expert_policy='random' needs top_k=2, not"),
        (lambda: TokenChoice(limited_groups=2), r"limited_groups=2 exceeds num_groups=1"),
        (lambda: TokenChoice(norm_order=2.0, normalize=False), "norm_order=2.0 needs normalize=True, not False"),
        (lambda: TokenChoice(norm_order=2.0, normalize="kept"), "norm_order=2.0 needs normalize=True, not 'kept'"),
        (lambda: TokenChoice(1, norm_order=2.0), "norm_order=2.0 needs normalize=True, not None"),
        (lambda: TokenChoice(1, normalize="kept"), "normalize='kept' with top_k=1 makes every gate 1"),
        (lambda: TokenChoice(normalize="kept", expert_scale=True), "not with normalize='kept'"),
        (lambda: TokenChoice(input_norm=True, noise="learned"), "input_norm=True is not for noise='learned'"),
        (lambda: TokenChoice(logit_norm=1.0, score_func="sigmoid"), r"logit_norm=1.0 needs score_func='softmax'"),
        (lambda: TokenChoice(9).build(16, 8), r"top_k=9 exceeds num_experts=8"),
        (lambda: TokenChoice(num_groups=3).build(16, 8), r"num_groups=3 does not divide num_experts=8"),
        (lambda: TokenChoice(3, num_groups=4, limited_groups=1).build(16, 8), r"top_k=3 exceeds the 2 experts of limi"),
        (lambda: MoEConfig(4, TokenChoice(logit_norm=1.0), balance=Balance(router_z_loss=0.1)),
         r"balance.router_z_loss=0.1 does not apply to TokenChoice"),
        (lambda: TokenRounding(top_k=1, normalize=True), r"normalize=True with top_k=1 .* no gradient"),
        (lambda: MoEConfig(3, TokenRounding(4)), r"top_k=4 exceeds num_experts=3"),
        (lambda: MoEConfig(4, TokenRounding(), capacity_factor=1.25), r"capacity_factor=1.25 does not apply to TokenR"),
        (lambda: MoEConfig(4, TokenRounding(), group="sequence"), r"group='sequence' does not apply to TokenRounding"),
        (lambda: MoEConfig(4, TokenRounding()).build(8, causal=True),
         r"TokenRounding \(arXiv 2512\.14080\) lets later tokens change earlier ones"),
        (lambda: MoEConfig(1, Threshold()), r"num_experts=1 has no second one"),
        (lambda: MoEConfig(2, NullExperts(4, 1)), r"top_k=4 exceeds num_experts=2 plus num_null_experts=1"),
        (lambda: MoEConfig(3, DynamicThreshold(4)), r"max_k=4 exceeds num_experts=3"),
        (lambda: Hierarchical(2, 3), r"top_groups=3 exceeds num_groups=2"),
        (lambda: MoEConfig(8, Hierarchical(3)), r"num_groups=3 does not divide num_experts=8"),
        (lambda: MoEConfig(8, Hierarchical(4, top_k=3)), r"top_k=3 exceeds the 2 experts of a group"),
        (lambda: MoEConfig(8, Prototypes(3)), r"num_prototypes=3 does not divide num_experts=8"),
        (lambda: MoEConfig(4, Prototypes(4)), r"num_prototypes=4 leaves one of num_experts=4 to each group"),
        (lambda: Ensemble(top_k=1, normalize=True), r"normalize=True with top_k=1 .* no gradient"),
        (lambda: MoEConfig(8, Ensemble(3)), r"num_members=3 does not divide num_experts=8"),
        (lambda: MoEConfig(8, Ensemble(4, top_k=3)), r"top_k=3 exceeds the 2 experts of a member"),
        (lambda: MoEConfig(8, ReLURouting(9)), "top_k=9 exceeds num_experts=8"),
        (lambda: MoEConfig(8, ReLURouting(max_k=9)), "max_k=9 exceeds num_experts=8"),
        (lambda: MoEConfig(8, ReLURouting(max_k=1)), "max_k=1 is less than top_k=2"),
        (lambda: MoEConfig(1, SparseMixer()), "num_experts=1 has no second one"),
        (lambda: DSelectK(3, max_k=2), r"max_k=2 is less than top_k=3"),
        (lambda: DSelectK(3, eval_max_k=2), r"eval_max_k=2 is less than top_k=3"),
        (lambda: MoEConfig(4, DSelectK(5)), r"top_k=5 exceeds num_experts=4"),
        (lambda: MoEConfig(4, DSelectK(max_k=5)), r"max_k=5 exceeds num_experts=4"),
        (lambda: MoEConfig(1, DSelectK(1)), r"nothing to select among num_experts=1"),
        (lambda: MoEConfig(4, Dense(eval_top_k=5)), r"eval_top_k=5 exceeds num_experts=4"),
        (lambda: DenseToSparse(tau_start=0.2), r"tau_end=0.3 is above tau_start=0.2"),
        (lambda: MoEConfig(4, DenseToSparse(max_k=5)), r"max_k=5 exceeds num_experts=4"),
        (lambda: MoEConfig(4, DenseToSparse(threshold=0.25)), r"threshold=0.25 is not below 1 / 4"),
        (lambda: MoEConfig(4, Base(), balance=Balance(load=0.1)), "balance.load=0.1 does not apply to Base"),
        (lambda: MoEConfig(4, Sinkhorn(5)), r"top_k=5 exceeds num_experts=4"),
        (lambda: MoEConfig(4, ExpertChoice(), capacity_factor=1.25), f"capacity_factor=1.25{OWN}, which has its own"),
        (lambda: MoEConfig(4, ExpertChoice(), eval_capacity_factor=2.0), f"eval_capacity_factor=2.0{OWN}$"),
        (lambda: MoEConfig(4, ExpertChoice(), priority="score"), f"priority='score'{OWN}$"),
        (lambda: MoEConfig(4, ExpertChoice(), balance=Balance(importance=0.1)), "balance.importance=0.1 does not"),
        (lambda: MoEConfig(1, ExpertChoice(0.5)), ONE),
        (lambda: ExpertChoice(0.5).build(8, 1), ONE),
    ],
)  # fmt: skip
def test_a_wrong_option_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
