"""The single tower against a plain transformer, what its experts are given, and two towers with its blocks."""

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from small_pairs import MOE, SIZES, TOWER, pair_batch, retriever
from torch import Tensor
from torch.testing import assert_close

import core
from apps.multimodal.towers.random_init import PatchImages, PieceTexts
from apps.multimodal.towers.stack import IMAGE, TEXT, PartPacking
from apps.multimodal.towers.towers import SharedTransformer, SingleTower, Sizes
from apps.multimodal.towers.two_towers import TwoTowers
from apps.nets.packing import Packing


def slow_blocks(tower: SharedTransformer, x_LD: Tensor, heads: int) -> Tensor:
    """Pre-norm blocks over one image or text, from the parameters alone, and the mean over its tokens."""
    for layer in tower.stack.layers:
        qkv = layer.mixing.qkv
        q, k, v = F.linear(layer.mixing_norm(x_LD), qkv.weight, qkv.bias).unflatten(-1, (3, heads, -1)).unbind(1)
        weights_HLL = (torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        x_LD = x_LD + layer.mixing.out(torch.einsum("hqk,khd->qhd", weights_HLL, v).flatten(1))
        x_LD = x_LD + layer.ffn(layer.ffn_norm(x_LD))
    return tower.stack.norm(x_LD).mean(0)


def test_dense_blocks_against_a_loop_over_images_and_texts():
    tower, batch = retriever(moe=None).eval().model.towers, pair_batch(5)
    image_BD, text_BD = tower(batch.image, batch.text_BL)
    for image, got_D in zip(batch.image, image_BD, strict=True):
        # Patches of 4 x 4 row by row; a patch's numbers are channel by channel, row by row.
        corners = [(row, column) for row in (0, 4) for column in (0, 4)]
        patches = torch.stack([image[:, r : r + 4, c : c + 4].flatten() for r, c in corners])
        x_LD = tower.patches.proj(patches) + tower.patches.pos_embed.weight
        assert_close(got_D, slow_blocks(tower, x_LD, heads=2), rtol=1e-5, atol=1e-5)
    for text_L, got_D in zip(batch.text_BL, text_BD, strict=True):
        ids = text_L[text_L > 0]
        x_LD = tower.pieces.embed.weight[ids] + tower.pieces.pos_embed.weight[: len(ids)]
        assert_close(got_D, slow_blocks(tower, x_LD, heads=2), rtol=1e-5, atol=1e-5)


def test_vectors_are_of_one_image_or_text_alone_and_average_its_tokens():
    module, batch = retriever().eval(), pair_batch(5)
    image_BD, text_BD, logits = module(batch.image, batch.text_BL)
    assert logits == ()
    assert_close(module.image_vectors(batch.image[2:3]), image_BD[2:3])
    assert_close(module.text_vectors(F.pad(batch.text_BL[:1], (0, 3))), text_BD[:1])
    for vectors in (image_BD, text_BD):
        assert vectors.dtype == torch.float32
        assert_close(vectors.norm(dim=-1), torch.ones(5))
    module, batch = retriever().eval(), pair_batch(3)
    tower = module.model.towers
    image_BD, text_BD = tower(batch.image, batch.text_BL)
    assert_close(tower.image_tokens(batch.image).mean(1), image_BD)
    text_BLD, length_B1 = tower.text_tokens(batch.text_BL), (batch.text_BL > 0).sum(1, keepdim=True)
    assert text_BLD.shape == (3, 4, 16)
    assert not text_BLD[0, 2:].any()
    assert_close(text_BLD.sum(1) / length_B1, text_BD)
    # A text without pieces has a finite vector.
    text_BL = batch.text_BL * torch.tensor([[1], [0], [1]])
    assert not module.text_vectors(text_BL)[1].any()
    assert not module.text_vectors(text_BL * 0).any()


def test_the_experts_see_both_modalities_in_one_call_and_no_padding():
    module, batch = retriever(moe_blocks="all").eval(), pair_batch(3)
    with core.record(module) as tape:
        module(batch.image, batch.text_BL)
    assert [entry.name for entry in tape.entries] == [f"model.towers.stack.layers.{i}.ffn" for i in (0, 1)]
    context = tape.entries[0].context
    # 3 images of 4 patches, and texts of 2, 3 and 4 pieces.
    assert context.valid_BS.sum(1).tolist() == [4, 4, 4, 2, 3, 4]
    assert context.modality_BS.tolist() == [[IMAGE] * 4] * 3 + [[TEXT] * 4] * 3
    assert context.token_ids_BS[0].tolist() == [20, 21, 22, 23]
    assert context.token_ids_BS[3:].tolist() == batch.text_BL.tolist()
    # 12 patches and 9 pieces, 2 experts each.
    assert int(tape.entries[0].routing.tokens_per_expert_E.sum()) == 2 * (12 + 9)


def test_limeo_s_losses_are_of_both_modalities():
    none = {"load_balancing_loss": 0.0, "router_z_loss": 0.0}
    local = {"local_entropy": 0.5, "local_entropy_modality": TEXT}
    balance = core.Balance(**none, **local, global_entropy=0.25, num_modalities=2, entropy_threshold=1.0)
    module, batch = retriever(moe=core.MoEConfig(4, core.TokenChoice(1), core.FFN(8), balance=balance)), pair_batch(3)
    with core.record(module) as tape:
        module(batch.image, batch.text_BL)
    losses = core.aux_losses(tape)
    (entry,) = tape.entries
    scores_TE, valid_T = entry.routing.evidence.scores_TE, entry.context.valid_BS.flatten()
    modality_T = entry.context.modality_BS.flatten()
    of_each = [scores_TE[valid_T & (modality_T == kind)] for kind in (IMAGE, TEXT)]
    assert [len(scores) for scores in of_each] == [12, 9]
    local = torch.special.entr(of_each[TEXT]).sum(-1).mean()
    above = [(1.0 - torch.special.entr(scores.mean(0)).sum()).clamp_min(0.0) for scores in of_each]
    assert_close(losses.terms["local_entropy"], local.detach())
    assert_close(losses.terms["global_entropy"], sum(above).detach())
    assert_close(losses.total, 0.5 * local + 0.25 * sum(above))


@pytest.mark.parametrize("experts", [1, 2])
def test_tokens_of_higher_scores_are_served_first_whatever_their_modality(experts):
    # Batch-prioritized routing: with a third of the room, the best-scored tokens of images and texts are computed.
    config = core.MoEConfig(experts, core.TokenChoice(1), core.FFN(8), capacity_factor=1 / 3, priority="score")
    module, batch = retriever(moe=config).eval(), pair_batch(3)
    with core.record(module) as tape:
        module(batch.image, batch.text_BL)
    (entry,) = tape.entries
    routing, (best_T, expert_T) = entry.routing, entry.routing.evidence.scores_TE.max(-1)
    computed_T = torch.zeros(routing.num_tokens, dtype=torch.bool)
    computed_T[routing.token_index_N[routing.expert_ids_N < experts]] = True
    valid_T = entry.context.valid_BS.flatten()
    for expert in range(experts):
        own_T = valid_T & (expert_T == expert)
        served, left = best_T[own_T & computed_T], best_T[own_T & ~computed_T]
        assert not len(left) or not len(served) or served.min() >= left.max()
    assert int((valid_T & ~computed_T).sum()) > 0


def test_a_network_is_built_without_a_module_and_rows_are_padded_to_the_longest():
    tower = TOWER.build(Sizes(**SIZES), MOE, "last1")
    assert isinstance(tower, SharedTransformer)
    assert (tower.moe_blocks, TOWER.widths) == ((1,), (16,))
    image_BD, text_BD = tower(None, pair_batch(2).text_BL)
    assert image_BD is None
    assert text_BD.shape == (2, 16)
    first, _ = Packing.of(torch.tensor([[True, True, True], [True, False, False]]))
    second, _ = Packing.of(torch.tensor([[False, False], [True, False]]))
    joined = PartPacking.join((first, second), ())
    assert (joined.length, joined.num_rows, joined.slot_T.tolist()) == (3, 4, [0, 1, 2, 3, 9])
    assert joined.last_B.tolist() == [2, 3, -1, 4]
    assert joined.pad(torch.arange(1.0, 6.0)[:, None])[..., 0].tolist() == [[1, 2, 3], [4, 0, 0], [0, 0, 0], [5, 0, 0]]


TWO = TwoTowers(PatchImages(blocks_as=TOWER), PieceTexts(blocks_as=TOWER))


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "sparse"])
def test_with_the_weights_of_a_single_tower_they_have_its_vectors(moe):
    single, two, batch = retriever(moe=moe).eval(), retriever(moe=moe, tower=TWO).eval(), pair_batch(5)
    weights = single.model.towers.state_dict()
    for part in (two.model.towers.image, two.model.towers.text):
        own = part.network.state_dict()
        part.network.load_state_dict({name: weights[name] for name in own})
        assert own.keys() < weights.keys()
    for kind in ("image_proj", "text_proj"):
        getattr(two.model, kind).load_state_dict(getattr(single.model, kind).state_dict())
    assert_close(two(batch.image, batch.text_BL), single(batch.image, batch.text_BL))
    assert_close(two.model.towers.image_tokens(batch.image), single.model.towers.image_tokens(batch.image))
    assert_close(two.model.towers.text_tokens(batch.text_BL), single.model.towers.text_tokens(batch.text_BL))


def test_each_tower_s_experts_see_one_modality():
    module, batch = retriever(tower=TWO).eval(), pair_batch(3)
    with core.record(module) as tape:
        module(batch.image, batch.text_BL)
    names = [entry.name for entry in tape.entries]
    assert names == [f"model.towers.{part}.network.stack.layers.1.ffn" for part in ("image", "text")]
    assert names == list(module.comparison.moe_block_names)
    for entry, kind in zip(tape.entries, (IMAGE, TEXT), strict=True):
        assert entry.context.modality_BS.unique().tolist() == [kind]
    figures = core.RoutingStats.from_tape(tape).layers[names[TEXT]].figures()
    assert "modality1_experts" in figures
    assert "modality0_experts" not in figures


@pytest.mark.parametrize("tower", [TOWER, TWO], ids=["one tower", "two"])
def test_recomputed_blocks_have_the_same_gradients(tower):
    batch, gradients = pair_batch(4), []
    for checkpointed in (False, True):
        module = retriever(tower=tower, grad_checkpointing=checkpointed).train()
        module.training_loss(batch).total.backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    assert_close(gradients[0], gradients[1])


def test_bad_input():
    tower = SingleTower(width=16, depth=2, num_heads=2, patch_size=3)
    refused("image_size=8 is not divisible by patch_size=3", retriever, tower=tower)
    refused("dim=16 is not divisible by num_heads=3", SingleTower, width=16, num_heads=3)
    task = core.MoEConfig(4, core.Task(num_tasks=2), core.FFN(8))
    refused(r"context.task_ids_B, which ImageTextRetriever does not give", retriever, moe=task)
    refused("pretrained=minilm: there are no weights of a PieceTexts", PieceTexts, pretrained="minilm")
    module, batch = retriever(), pair_batch(2)
    refused(r"images have shape \(2, 3, 4, 8\): it must be \(B, 3, 8, 8\)", module.image_vectors, batch.image[:, :, :4])
    refused("a text of 7 subwords is longer than max_tokens=6", module.text_vectors, torch.full((1, 7), 3))
    refused(r"texts are torch.float32 of shape \(2, 3\)", module.text_vectors, torch.zeros(2, 3))
