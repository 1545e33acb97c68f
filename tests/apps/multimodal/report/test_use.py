"""What experts compute, counted in batches, against a loop over the routed pairs."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from small_pairs import TOWER, pair_batch, retriever

import core
from apps.multimodal.report.use import PairUse
from apps.multimodal.towers.pretrained import BertTexts, ViTImages
from apps.multimodal.towers.random_init import PatchImages, PieceTexts
from apps.multimodal.towers.two_towers import TwoTowers
from apps.porting.sentences import BertConfig
from apps.vision.model import ViTConfig


def used(module, batches, wanted=0):
    use, tapes = PairUse(module.eval(), {"color": 3, "size": 2}, wanted), []
    for batch in batches:
        with torch.no_grad(), core.record(module) as tape:
            module(batch.image, batch.text_BL)
        use.add(tape, batch)
        tapes.append(tape)
    return use, tapes


def test_counts_are_those_of_a_loop():
    module, batches = retriever(), [pair_batch(4), pair_batch(5, seed=2)]
    use, tapes = used(module, batches)
    assert list(use.counts["modality"]) == ["block 1"]
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
    counts = {what: of_layers["block 1"] for what, of_layers in use.counts.items()}
    # 2 experts for each of 4 patches of 9 images, and for the pieces of texts of 2, 3, 4, 5 and of 2, 3, 4, 5, 6.
    assert counts["modality"].sum(1).tolist() == [2 * 36, 2 * 34]
    for (m, e), count in by_modality.items():
        assert counts["modality"][m, e] == count
    for a, (attribute, classes) in enumerate({"color": 3, "size": 2}.items()):
        want = [[by_class[a, c, e] for e in range(4)] for c in range(classes)]  # -1 is no class
        assert counts[attribute].tolist() == want
    assert {(v, e): int(n) for (v, e), n in by_piece.items()} == {
        (int(v), int(e)): int(counts["piece"][v, e]) for v, e in zip(*counts["piece"].nonzero(), strict=True)
    }
    commonest, count_V = use.frequent_pieces(["block 1"], 3), counts["piece"].sum(1)
    assert count_V[commonest[0]] == count_V.max()
    assert len(use.frequent_pieces(["block 1"], 1000)) == int((count_V > 0).sum())


def test_modalities_in_passes_of_their_own_count_as_in_one():
    module, batch = retriever().eval(), pair_batch(6)
    together, _ = used(module, [batch])
    apart = PairUse(module, {"color": 3, "size": 2})
    with torch.no_grad(), core.record(module) as tape:
        module.image_vectors(batch.image)
        module.text_vectors(batch.text_BL)
    assert len(tape.entries) == 2
    apart.add(tape, batch)
    for what, of_layers in together.counts.items():
        assert of_layers["block 1"].tolist() == apart.counts[what]["block 1"].tolist()
    assert torch.equal(together.patches["block 1"].gate_En, apart.patches["block 1"].gate_En)


def test_the_patches_of_an_expert_are_those_of_its_largest_gates():
    module, batch = retriever(), pair_batch(5)
    use, (tape,) = used(module, [batch])
    routing = tape.entries[0].routing
    length, sample = routing.num_tokens // 10, use.patches["block 1"]
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
    module, batch = retriever(), pair_batch(4)._replace(image_B=torch.tensor([3, 3, 5, 6]))
    use, (tape,) = used(module, [batch, pair_batch(4)][:1], wanted=2)
    assert [pair.caption for pair in use.shown] == [0, 2]  # pair 1 has the image of pair 0
    first, second = use.shown
    assert (first.ids, second.ids) == (batch.text_BL[0, :2].tolist(), batch.text_BL[2, :4].tolist())
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
    assert "block 1: 1 of 2 experts (0) computed none of the 160 subwords of texts." in lines
    (of_doctor,) = (line for line in lines if "Remedy" in line)
    assert of_doctor.startswith("block 1: the tokens of text use 1.0 of 2 experts, and each takes 1.0. Remedy: give")


def test_a_healthy_model_raises_no_alarm_and_its_experts_say_nothing_of_classes():
    use, _ = used(retriever(), [pair_batch(200)])
    assert use.alarms() == []
    ((name, shares),) = use.class_information().items()
    assert name == "block 1"
    assert all(0 <= share < 0.2 for share in shares)
    dense, _ = used(retriever(moe=None), [pair_batch(4)], wanted=2)
    assert (dict(dense.counts["modality"]), list(dense.shown), dense.alarms()) == ({}, [], [])


@pytest.mark.parametrize("tower", [
    TwoTowers(PatchImages(blocks_as=TOWER), PieceTexts(blocks_as=TOWER)),
    TwoTowers(
        ViTImages(vit=ViTConfig(patch_size=4, embed_dim=16, depth=2, num_heads=2)),
        BertTexts(bert=BertConfig(16, 32, depth=2, num_heads=2, max_positions=16)),
    ),
], ids=["from_scratch", "as_published"])  # fmt: skip
def test_a_tower_for_each_modality(tower):
    use, _ = used(retriever(tower=tower), [pair_batch(6)], wanted=2)
    by_modality = use.counts["modality"]
    assert set(by_modality) == {"image block 1", "text block 1"}
    assert by_modality["text block 1"].sum(1).tolist() == [0, 2 * (2 + 3 + 4 + 5 + 6 + 2)]
    of_images, of_texts = by_modality["image block 1"].sum(1)
    assert of_images >= 2 * 6 * 4  # a class token may stand before the patches
    assert (of_texts, use.patches["image block 1"].patch_EnCHW.shape[2:]) == (0, (3, 4, 4))
    assert (list(use.patches), list(use.counts["piece"])) == (["image block 1"], ["text block 1"])
    assert use.counts["piece"]["text block 1"].sum() == by_modality["text block 1"].sum()
    for pair in use.shown:
        assert (pair.grids["image block 1"].shape, len(pair.pieces["text block 1"])) == ((2, 2), len(pair.ids))
    assert not [line for line in use.alarms() if "Remedy" in line]
