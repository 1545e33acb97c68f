"""The losses of pairs by hand and by loops, what equal pairs are to each other, and several ranks against one."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from small_pairs import pair_batch, retriever
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from two_ranks import WORLD, on_two_ranks

from apps.multimodal.pairs.pairs import PairBatch
from apps.multimodal.towers.loss import ContrastiveLoss, SigmoidLoss, SoftmaxLoss, attribute_loss

IMAGES = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
TEXTS = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
DIFFERENT = torch.arange(2)


def vectors(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(F.normalize(torch.randn(rows, 6, generator=generator), dim=-1) for _ in range(2))  # type: ignore[return-value]


def test_softmax_and_sigmoid_by_hand():
    # Products [[1, 0.6], [0, 0.8]] over 0.5 are [[2, 1.2], [0, 1.6]].
    loss = SoftmaxLoss(temperature=0.5).build()(IMAGES, TEXTS, DIFFERENT, DIFFERENT)
    image_to_text = math.log(1 + math.exp(1.2 - 2)) + math.log(1 + math.exp(0 - 1.6))
    text_to_image = math.log(1 + math.exp(0 - 2)) + math.log(1 + math.exp(1.2 - 1.6))
    assert float(loss) == pytest.approx((image_to_text / 2 + text_to_image / 2) / 2, rel=1e-6)
    # Scores [[2, 1.2], [0, 1.6]] - 1: the diagonal is right, the rest wrong; over the 2 images.
    loss = SigmoidLoss(temperature=0.5, bias=-1.0).build()(IMAGES, TEXTS, DIFFERENT, DIFFERENT)
    each = [math.log(1 + math.exp(-z)) for z in (1.0, 0.6)] + [math.log(1 + math.exp(z)) for z in (0.2, -1.0)]
    assert float(loss) == pytest.approx(sum(each) / 2, rel=1e-6)


def slow_softmax(image_BD: Tensor, text_BD: Tensor, equal: str, same: Any, temperature: float) -> float:
    """CLIP's loss by loops over the pairs."""
    B, total = len(image_BD), 0.0
    for query_BD, key_BD in ((image_BD, text_BD), (text_BD, image_BD)):
        for i in range(B):
            score = {j: float(query_BD[i] @ key_BD[j]) / temperature for j in range(B)}
            right = [j for j in score if j == i or (equal == "positive" and same(i, j))]
            kept = [j for j in score if j == i or equal != "ignore" or not same(i, j)]
            normalizer = math.log(sum(math.exp(score[j]) for j in kept))
            total += sum(normalizer - score[j] for j in right) / len(right) / B / 2
    return total


def slow_sigmoid(image_BD: Tensor, text_BD: Tensor, equal: str, same: Any, temperature: float, bias: float) -> float:
    """SigLIP's loss by loops over the pairs."""
    B, total = len(image_BD), 0.0
    for i in range(B):
        for j in range(B):
            if i != j and same(i, j) and equal == "ignore":
                continue
            z = 1 if i == j or (same(i, j) and equal == "positive") else -1
            score = z * (float(image_BD[i] @ text_BD[j]) / temperature + bias)
            total += math.log(1 + math.exp(-score)) / B
    return total


@pytest.mark.parametrize("equal", ["ignore", "positive", "negative"])
def test_pairs_of_equal_texts_or_images_against_loops(equal):
    # Pairs 0 and 2 have one text, and pairs 3 and 4 one image.
    captions, images = torch.tensor([7, 8, 7, 9, 5]), torch.tensor([0, 1, 2, 3, 3])
    image_BD, text_BD = vectors(5)

    def same(i: int, j: int) -> bool:
        return {i, j} in ({0, 2}, {3, 4})

    softmax = SoftmaxLoss(equal=equal).build()(image_BD, text_BD, images, captions)
    assert float(softmax) == pytest.approx(slow_softmax(image_BD, text_BD, equal, same, 0.07), rel=1e-5)
    sigmoid = SigmoidLoss(equal=equal, bias=-2.0).build()(image_BD, text_BD, images, captions)
    assert float(sigmoid) == pytest.approx(slow_sigmoid(image_BD, text_BD, equal, same, 0.1, -2.0), rel=1e-5)


def test_a_text_that_all_images_have_teaches_nothing_where_equal_pairs_are_ignored():
    image_BD, text_BD = vectors(3)
    image_BD.requires_grad_()
    one_B = torch.zeros(3, dtype=torch.int64)
    loss = SoftmaxLoss().build()(image_BD, text_BD[:1].expand(3, -1), torch.arange(3), one_B)
    loss.backward()
    assert float(loss) == 0.0
    assert not image_BD.grad.any()


@pytest.mark.parametrize("config", [SoftmaxLoss(), SigmoidLoss()], ids=["softmax", "sigmoid"])
def test_scores_are_float32_whatever_the_precision_of_the_network(config):
    image_BD, text_BD = vectors(8)
    loss = config.build()
    expected = loss(image_BD, text_BD, torch.arange(8), torch.arange(8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(image_BD, text_BD, torch.arange(8), torch.arange(8))
    assert_close(got, expected, rtol=0, atol=0)


def test_what_learns_and_within_which_bound():
    assert dict(SoftmaxLoss(learn_temperature=False).build().named_parameters()) == {}
    assert float(SoftmaxLoss().build().temperature) == pytest.approx(0.07)
    sigmoid = dict(SigmoidLoss().build().named_parameters())
    assert {name: round(float(p), 4) for name, p in sigmoid.items()} == {"log_scale": 2.3026, "bias": -10.0}
    refused(r"temperature=0.001 must be at least 0.01", SoftmaxLoss, temperature=0.001)
    # Those of a checkpoint replace them, but for a temperature that is not learned.
    loss = SoftmaxLoss(0.5, learn_temperature=False).build()
    loss.begin(2.5, None)
    assert loss.temperature.item() == pytest.approx(0.5)
    loss = SigmoidLoss().build()
    loss.begin(9.0, -3.0)
    assert (loss.temperature.item(), loss.bias.item()) == (pytest.approx(0.01), -3.0)  # the bound
    loss = SoftmaxLoss(temperature=0.011).build()
    step = torch.optim.SGD(loss.parameters(), lr=1e3)
    image_BD, _ = vectors(4)
    # The texts are the images: a lower temperature is better, as far as it goes.
    noisy_BD = F.normalize(image_BD + 0.3 * vectors(4, seed=5)[0], dim=-1)
    loss(image_BD, noisy_BD, torch.arange(4), torch.arange(4)).backward()
    loss.log_scale.grad.fill_(-1.0)
    step.step()
    loss.clamp_()
    assert float(loss.temperature) == pytest.approx(0.01, rel=1e-5)
    loss.log_scale.grad = None
    loss(image_BD, image_BD.roll(1, 0), torch.arange(4), torch.arange(4)).backward()
    assert float(loss.log_scale.grad) > 0  # wrong answers ask for a higher temperature, also at the bound


def test_attributes_count_known_labels_and_texts_have_probabilities():
    # First attribute: logits (0, 0) for two known labels, log 2 each. Second: one known, of three equal classes.
    logits = (torch.zeros(3, 2), torch.zeros(3, 3))
    label_BA = torch.tensor([[0, -1], [1, 2], [-1, -1]])
    assert float(attribute_loss(logits, label_BA)) == pytest.approx((math.log(2) + math.log(3)) / 2, rel=1e-6)
    assert float(attribute_loss(logits, torch.full((3, 2), -1))) == 0.0
    image_ND, text_CD = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # The products 1 and 0 over the temperature 0.5 are 2 and 0.
    chosen = SoftmaxLoss(temperature=0.5).build().probabilities(image_ND, text_CD)
    assert chosen[0].tolist() == pytest.approx([math.e**2 / (math.e**2 + 1), 1 / (math.e**2 + 1)])
    judged = SigmoidLoss(temperature=0.5, bias=-1.0).build().probabilities(image_ND, text_CD)
    assert judged[0].tolist() == pytest.approx([1 / (1 + math.e**-1), 1 / (1 + math.e**1)])  # of 2 - 1 and 0 - 1


def part_of(batch: PairBatch, rank: int) -> PairBatch:
    """This rank's half of a batch; the whole one where ``rank`` is -1."""
    return batch if rank < 0 else PairBatch(*(column.chunk(WORLD)[rank] for column in batch))


def trained_step(rank: int, config: ContrastiveLoss) -> dict[str, Tensor]:
    """Loss and gradients of a step on one process (rank -1), or on this rank under DDP."""
    module, batch = retriever(loss=config).train(), pair_batch(6)
    # Pairs 1 and 4, on different ranks, have one text.
    batch = batch._replace(caption_B=torch.tensor([0, 1, 2, 3, 1, 5]))
    step = _Step(module) if rank < 0 else DistributedDataParallel(_Step(module))
    loss = step(part_of(batch, rank))
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in module.named_parameters()}}


class _Step(torch.nn.Module):
    """A module whose forward is the loss of a training step."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: PairBatch) -> Tensor:
        return self.module.training_loss(batch).total


KINDS: dict[str, ContrastiveLoss] = {"softmax": SoftmaxLoss(equal="positive"), "sigmoid": SigmoidLoss()}


def trained_steps(rank: int) -> dict[str, dict[str, Tensor]]:
    return {kind: trained_step(rank, config) for kind, config in KINDS.items()}


def test_two_ranks_learn_what_one_process_with_all_pairs_learns(tmp_path):
    ranks = on_two_ranks(trained_steps, tmp_path)
    for kind, whole in trained_steps(-1).items():
        assert_close((ranks[0][kind].pop("loss") + ranks[1][kind].pop("loss")) / 2, whole.pop("loss"))
        for of_rank in ranks:
            assert of_rank[kind].keys() == whole.keys()
            for name, gradient in whole.items():
                scale = gradient.abs().max().clamp_min(1e-3)
                assert_close(of_rank[kind][name] / scale, gradient / scale, rtol=0, atol=1e-5, msg=f"{kind}: {name}")
