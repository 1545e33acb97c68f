"""What experts compute, counted in batches, against a loop over the routed pairs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from small_pairs import MOE, TOWER, pair_batch, retriever

import core
from apps.multimodal.drawn import PatchImages, PieceTexts
from apps.multimodal.pretrained import BertTexts, ViTImages
from apps.multimodal.two_towers import TwoTowers
from apps.multimodal.use import ExpertUse, class_information, frequent_pieces, layer_name
from apps.porting.sentences import BertConfig
from apps.vision.model import ViTConfig


def used(module, batches, wanted=0):
    use = ExpertUse(module.eval(), (3, 2), wanted)
    tapes = []
    for batch in batches:
        with torch.no_grad(), core.record(module) as tape:
            module(batch.image, batch.text_BL)
        use.add(tape, batch)
        tapes.append(tape)
    return use, tapes


def test_counts_are_those_of_a_loop():
    module = retriever()
    batches = [pair_batch(4), pair_batch(5, seed=2)]
    use, tapes = used(module, batches)
    (name,) = use.layers
    assert name == "block 1"
    by_modality, by_class, by_piece = Counter(), Counter(), Counter()
    for batch, tape in zip(batches, tapes, strict=True):
        (entry,) = tape.entries
        routing, B = entry.routing, len(batch.image)
        length = routing.num_tokens // (2 * B)  # 4 patches, or as many pieces as the longest text has
        for t, e in zip(routing.token_index_N.tolist(), routing.expert_ids_N.tolist(), strict=True):
            row, place = divmod(t, length)
            if e == 4:
                continue
            by_modality[int(row >= B), e] += 1
            if row < B:
                for a in range(2):
                    by_class[a, int(batch.label_BA[row, a]), e] += 1
            else:
                by_piece[int(batch.text_BL[row - B, place]), e] += 1
    layer = use.layers[name]
    # 2 experts for each of 4 patches of 9 images, and for the pieces of texts of 2, 3, 4, 5 and of 2, 3, 4, 5, 6.
    assert layer.tokens_M.tolist() == [36, 34]
    assert int(layer.by_modality_ME.sum()) == 2 * (36 + 34)
    for (m, e), count in by_modality.items():
        assert layer.by_modality_ME[m, e] == count
    for a, classes in enumerate((3, 2)):
        want = [[by_class[a, c, e] for e in range(4)] for c in range(classes)]  # -1 is no class
        assert layer.by_class[a].tolist() == want
    assert {(v, e): int(n) for (v, e), n in by_piece.items()} == {
        (int(v), int(e)): int(layer.by_piece_VE[v, e]) for v, e in layer.by_piece_VE.nonzero()
    }
    commonest = frequent_pieces(use.layers, 3)
    counts = layer.by_piece_VE.sum(1)
    assert counts[commonest[0]] == counts.max()
    assert len(frequent_pieces(use.layers, 1000)) == int((counts > 0).sum())


def test_modalities_in_passes_of_their_own_count_as_in_one():
    module, batch = retriever().eval(), pair_batch(6)
    together, _ = used(module, [batch])
    apart = ExpertUse(module, (3, 2))
    with torch.no_grad(), core.record(module) as tape:
        module.image_vectors(batch.image)
        module.text_vectors(batch.text_BL)
    assert len(tape.entries) == 2
    apart.add(tape, batch)
    a, b = together.layers["block 1"], apart.layers["block 1"]
    assert torch.equal(a.tokens_M, b.tokens_M)
    assert torch.equal(a.by_modality_ME, b.by_modality_ME)
    assert all(torch.equal(x, y) for x, y in zip(a.by_class, b.by_class, strict=True))
    assert torch.equal(a.by_piece_VE, b.by_piece_VE)
    assert torch.equal(a.patches.gate_En, b.patches.gate_En)


def test_the_patches_of_an_expert_are_those_of_its_largest_gates():
    module, batch = retriever(), pair_batch(5)
    use, (tape,) = used(module, [batch])
    routing = tape.entries[0].routing
    length = routing.num_tokens // 10
    sample = use.layers["block 1"].patches
    best: dict[tuple[int, int], tuple[float, int]] = {}
    pairs = (x.tolist() for x in (routing.token_index_N, routing.expert_ids_N, routing.gates_N))
    for t, e, gate in zip(*pairs, strict=True):
        image, patch = divmod(t, length)
        if image < 5 and gate > best.get((e, image), (0.0, 0))[0]:
            best[e, image] = (gate, patch)
    for expert in range(4):
        own = sorted((value for (e, _), value in best.items() if e == expert), reverse=True)
        gates = [gate for gate in sample.gate_En[expert].tolist() if gate > 0]
        assert gates == pytest.approx([gate for gate, _ in own])
    (gate, image, patch) = max((g, i, p) for (e, i), (g, p) in best.items() if e == 0)
    row, column = divmod(patch, 2)  # 2 x 2 patches of 4 x 4 pixels
    want = batch.image[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
    assert torch.equal(sample.patch_EnCHW[0, 0], want)


def test_the_pairs_that_are_shown():
    module = retriever()
    batch = pair_batch(4)._replace(image_B=torch.tensor([3, 3, 5, 6]))
    use, (tape,) = used(module, [batch, pair_batch(4)][:1], wanted=2)
    assert [pair.caption for pair in use.shown] == [0, 2]  # pair 1 has the image of pair 0
    first, second = use.shown
    assert first.ids == batch.text_BL[0, :2].tolist()
    assert second.ids == batch.text_BL[2, :4].tolist()
    routing = tape.entries[0].routing
    length = routing.num_tokens // 8
    gates = torch.zeros(routing.num_tokens, 5).index_put_(
        (routing.token_index_N, routing.expert_ids_N), routing.gates_N
    )
    best_T = gates[:, :4].argmax(1)
    assert second.grids["block 1"].tolist() == best_T[2 * length : 2 * length + 4].view(2, 2).tolist()
    of_text = best_T[6 * length : 6 * length + 4].tolist()
    assert [experts[0] for experts in second.pieces["block 1"]] == of_text


def only(expert: int):
    """Return a model whose pieces of texts all take one expert of two, and whose patches take both."""
    module = retriever(moe=core.MoEConfig(2, core.TokenChoice(top_k=1), core.FFN(hidden_dim=4)))
    (layer,) = core.moe_layers(module).values()

    def decide(router, args, kwargs, routing):
        modality_T = args[1].modality_BS.flatten()
        expert_N = torch.where(modality_T[routing.token_index_N] == 1, expert, routing.token_index_N % 2)
        expert_N = torch.where(routing.expert_ids_N == 2, 2, expert_N)
        counts_E = torch.bincount(expert_N, minlength=3)[:2]
        return replace(routing, expert_ids_N=expert_N, tokens_per_expert_E=counts_E, chosen_per_expert_E=counts_E)

    layer.router.register_forward_hook(decide, with_kwargs=True)
    return module


def test_an_expert_set_that_a_modality_never_reaches():
    use, _ = used(only(1), [pair_batch(40)])
    lines = use.alarms()
    # 40 texts of 2 to 6 pieces, 4 on average.
    assert "block 1: 1 of 2 experts (0) computed none of the 160 pieces of texts." in lines
    (of_doctor,) = (line for line in lines if "Remedy" in line)
    assert of_doctor.startswith("block 1: the tokens of text use 1.0 of 2 experts, and each takes 1.0. Remedy: give")


def test_a_healthy_model_raises_no_alarm():
    use, _ = used(retriever(), [pair_batch(200)])
    assert use.alarms() == []


def test_what_experts_say_of_classes():
    use, _ = used(retriever(), [pair_batch(30)])
    ((name, shares),) = class_information(use.layers, 2).items()
    assert name == "block 1"
    assert all(0 <= share < 0.2 for share in shares)  # noise says nothing


def test_a_dense_model_has_no_use():
    use, _ = used(retriever(moe=None), [pair_batch(4)], wanted=2)
    assert not use.layers
    assert not use.shown
    assert use.alarms() == []


def test_names_of_layers():
    assert MOE.num_experts == 4
    assert layer_name("model.towers.stack.layers.1.ffn") == "block 1"
    assert layer_name("model.towers.image_tower.blocks.3.mlp") == "image block 3"
    assert layer_name("model.towers.text.layers.0.ffn") == "text block 0"
    assert layer_name("model.head.experts.task0") == "head.experts.task0"


@pytest.mark.parametrize(
    "tower",
    [
        TwoTowers(PatchImages(blocks_as=TOWER), PieceTexts(blocks_as=TOWER)),
        TwoTowers(
            ViTImages(vit=ViTConfig(patch_size=4, embed_dim=16, depth=2, num_heads=2)),
            BertTexts(bert=BertConfig(16, 32, depth=2, num_heads=2, max_positions=16)),
        ),
    ],
    ids=["from_scratch", "as_published"],
)
def test_a_tower_for_each_modality(tower):
    use, _ = used(retriever(tower=tower), [pair_batch(6)], wanted=2)
    image, text = use.layers["image block 1"], use.layers["text block 1"]
    assert len(use.layers) == 2
    assert text.tokens_M.tolist() == [0, 2 + 3 + 4 + 5 + 6 + 2]
    assert image.tokens_M[1] == 0
    assert image.tokens_M[0] >= 6 * 4  # a class token may stand before the patches
    assert text.patches is None
    assert image.patches.patch_EnCHW.shape[2:] == (3, 4, 4)
    assert not image.by_piece_VE.any()
    assert int(text.by_piece_VE.sum()) == 2 * int(text.tokens_M[1])
    for pair in use.shown:
        assert pair.grids["image block 1"].shape == (2, 2)
        assert len(pair.pieces["text block 1"]) == len(pair.ids)
    assert not [line for line in use.alarms() if "Remedy" in line]
