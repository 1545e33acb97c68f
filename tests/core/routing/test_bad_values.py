"""Bad values of sizes and of the context end in one line that names the value and the rule."""

import numpy as np
import pytest
import torch
from torch import Tensor

import core
from core import CGC, MLP, PLE, Balance, MMoE, MoEConfig, RoutingContext, aux_loss, record


@pytest.mark.parametrize("config", [MoEConfig(8), MMoE(4), PLE(2), MMoE(4, router=core.TokenChoice(2))], ids=str)
@pytest.mark.parametrize(
    "dim, message",
    [(8.0, "dim=8.0 is not an integer"), ("8", "dim='8' is not an integer"), (0, "dim=0 is not at least 1")],
)
def test_a_width_that_is_none_is_refused(config, dim, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        config.build(dim) if isinstance(config, MoEConfig) else config.build(dim, 2)
    if isinstance(config, MoEConfig):
        with pytest.raises(ValueError, match=f"^out_{message}"):
            config.build(8, dim)
    else:
        with pytest.raises(ValueError, match=r"^num_domains=1\.5 is not an integer"):
            config.build(8, 2, 1.5)


B, S, D, E = 2, 5, 8, 8
IDS_BS = torch.arange(B * S).reshape(B, S) % 2
FEATURES = Balance(mutual_information=1.0, num_tasks=3, local_entropy=1.0, num_modalities=2)
GIVEN = {"token_ids_BS": IDS_BS, "task_ids_B": IDS_BS[:, 0], "domain_ids_B": IDS_BS[:, 0], "modality_BS": IDS_BS}
READERS = {
    "hash": (MoEConfig(E, core.Hash(vocab_size=7)), ["token_ids_BS"]),
    "stable": (MoEConfig(E, core.Stable(vocab_size=7)), ["token_ids_BS"]),
    "task": (MoEConfig(E, core.Task(num_tasks=3)), ["task_ids_B"]),
    "domain": (MoEConfig(E, core.Domain(num_domains=8)), ["domain_ids_B"]),
    "domain, random": (MoEConfig(E, core.DomainRandom(4, 7)), ["token_ids_BS", "domain_ids_B"]),
    "losses": (MoEConfig(E, core.TokenChoice(2), balance=FEATURES), ["task_ids_B", "modality_BS"]),
    "gates": (CGC(2, MLP((4,)), num_domain_experts=1), ["domain_ids_B"]),
}


def run(config: object, **fields: object) -> Tensor:
    if isinstance(config, MoEConfig):
        layer, x = config.build(D), torch.randn(B, S, D)
    else:
        layer, x = config.build(D, 2, 4), torch.randn(B, D)
    with record(layer) as tape:
        y = layer(x, RoutingContext(**fields))
    assert torch.equal(aux_loss(tape.detach()), aux_loss(tape))
    return y


@pytest.mark.parametrize("name, field", [(name, field) for name, (_, read) in READERS.items() for field in read])
def test_ids_of_another_form_are_refused_and_of_any_whole_dtype_are_taken(name, field):
    config, read = READERS[name]
    others, ids = {key: GIVEN[key] for key in read if key != field}, GIVEN[field]
    for good in (ids.int(), ids.to(torch.uint8)):
        assert run(config, **others, **{field: good}).isfinite().all()
    wrong = {
        "is torch.float32: ids are integers": ids.float(),
        "is torch.bool: ids are integers": ids.bool(),
        "is torch.complex64: ids are integers": ids.to(torch.complex64),
        "has shape": ids[..., None],
        "has shape ": ids[:1],
        "is a list, not a tensor": ids.tolist(),
        "is a ndarray, not a tensor": np.asarray(ids),
        "holds 101, which is not in range": ids + 100,
        "holds -100, which is not in range": ids - 100,
    }
    for message, bad in wrong.items():
        with pytest.raises(ValueError, match=rf"^context.{field} {message}") as error:
            run(config, **others, **{field: bad})
        assert "\n" not in str(error.value)


def test_weights_of_domains_and_validity_of_another_form_are_refused():
    config, weights = MoEConfig(E, core.Domain(num_domains=8)), torch.full((B, E), 0.125)
    field = "domain_weights_BE"
    for message, bad in {
        "is a list, not a tensor": weights.tolist(),
        "has shape": weights[:1],
        "is torch.complex64: weights are real": weights.to(torch.complex64),
        "holds -0.125: weights are finite and not negative": -weights,
        "holds nan: weights are finite and not negative": weights * torch.nan,
    }.items():
        with pytest.raises(ValueError, match=f"^context.{field} {message}"):
            config.build(D).eval()(torch.randn(B, S, D), RoutingContext(**{field: bad}))
    padded = weights.clone()
    padded[1] = torch.nan  # of a sequence without a real token
    valid = torch.tensor([[True], [False]]).expand(B, S)
    config.build(D).eval()(torch.randn(B, S, D), RoutingContext(valid_BS=valid, domain_weights_BE=padded))
    for reader in (MoEConfig(E), MoEConfig(E, core.SoftSlots()), MMoE(4)):
        with pytest.raises(ValueError, match=r"^context\.valid_BS is a list, not a tensor$"):
            run(reader, valid_BS=[[True] * S] * B)
