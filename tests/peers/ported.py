"""A small model of transformers with random weights, and ours made of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apps.data.subwords import BOS_ID, PAD_ID
from apps.nets.transformer import LanguageModel
from apps.nlp.decode import DecodeConfig, generate_ids, translate_ids
from apps.porting import FAMILIES, Architecture, from_published, load_pretrained, save_pretrained, to_published

VOCAB = 60
LENGTHS = (9, 5, 7, 1)


def randomize(model: Any, std: float = 0.4) -> Any:
    """In evaluation, no weight at its start: norms near 1, biases near 0, all others of ``std``.

    Embeddings are smaller: tied ones would make each id follow itself.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_norm = "norm" in name and name.endswith("weight")
            is_embedding = "shared." in name or "embed_tokens" in name
            small = 0.2 if is_norm else 0.05
            weight.normal_(1.0 if is_norm else 0.0, small if weight.ndim == 1 else std / 4 if is_embedding else std)
    return model.eval()


def source_ids(pad: int) -> Tensor:
    """Their ids of sources of unequal length, none of them special."""
    source_BS = torch.randint(4, VOCAB, (len(LENGTHS), max(LENGTHS)))
    return source_BS.masked_fill(torch.arange(max(LENGTHS)) >= torch.tensor(LENGTHS)[:, None], pad)


@dataclass
class Pair:
    """Theirs and ours with the same weights."""

    theirs: Any
    ours: Any
    architecture: Architecture

    @classmethod
    def of(cls, theirs: Any) -> Pair:
        dtype = next(theirs.parameters()).dtype
        architecture, weights = from_published(theirs.config.to_dict(), theirs.state_dict())
        ours = architecture.build().to(dtype).eval()
        ours.load_state_dict(weights)
        return cls(theirs, ours, architecture)

    def our_ids(self, ids: Tensor) -> Tensor:
        """Their ids in our order."""
        return self.architecture.vocabulary.ours[ids]

    @torch.no_grad()
    def logits(self) -> tuple[Tensor, Tensor]:
        """Theirs and ours, in the order of their ids, of padded sources and of targets that begin as theirs do."""
        config = self.theirs.config
        target_BL = torch.randint(4, VOCAB, (len(LENGTHS), 7))
        if isinstance(self.ours, LanguageModel):
            theirs = self.theirs(input_ids=target_BL).logits
            return theirs, self.ours(self.our_ids(target_BL))[..., self.architecture.vocabulary.ours]
        source_BS = source_ids(config.pad_token_id)
        real_BS = source_BS != config.pad_token_id
        target_BL[:, 0] = config.decoder_start_token_id
        theirs = self.theirs(input_ids=source_BS, attention_mask=real_BS.long(), decoder_input_ids=target_BL).logits
        our_target_BL = self.our_ids(target_BL)
        our_target_BL[:, 0] = BOS_ID
        ours = self.ours(self.our_ids(source_BS).masked_fill(~real_BS, PAD_ID), our_target_BL)
        return theirs, ours[..., self.architecture.vocabulary.ours]

    @torch.no_grad()
    def greedy(self, num: int = 12) -> tuple[list[list[int]], list[list[int]]]:
        """Return what theirs and ours write, in their ids, without end; never padding or begin."""
        config, vocabulary = self.theirs.config, self.architecture.vocabulary
        silent = [i for i in (vocabulary.pad, vocabulary.bos) if i is not None]
        options = {
            "max_new_tokens": num + 1,
            "do_sample": False,
            "num_beams": 1,
            "suppress_tokens": silent or None,
            "eos_token_id": vocabulary.eos,
            "pad_token_id": vocabulary.eos if vocabulary.pad is None else vocabulary.pad,
        }
        decode = DecodeConfig("greedy", max_length_ratio=0.0, max_length_extra=num, min_new_tokens=0)
        if isinstance(self.ours, LanguageModel):
            start_BL = torch.randint(4, VOCAB, (len(LENGTHS), 5))
            mask_BL = torch.ones_like(start_BL)
            theirs = self.theirs.generate(start_BL, attention_mask=mask_BL, **options)[:, start_BL.shape[1] :]
            hypotheses = generate_ids(self.ours, self.our_ids(start_BL), decode)
        else:
            source_BS = source_ids(config.pad_token_id)
            real_BS = source_BS != config.pad_token_id
            options["decoder_start_token_id"] = config.decoder_start_token_id
            theirs = self.theirs.generate(source_BS, attention_mask=real_BS.long(), **options)[:, 1:]
            hypotheses = translate_ids(self.ours, self.our_ids(source_BS).masked_fill(~real_BS, PAD_ID), decode)
        cut = [row[: row.index(vocabulary.eos)] if vocabulary.eos in row else row for row in theirs.tolist()]
        ours = [vocabulary.theirs[torch.tensor(ids, dtype=torch.int64)].tolist() for ids in hypotheses.best]
        return [row[:num] for row in cut], ours

    def check_greedy(self) -> None:
        """Both write the same, and not the same of everything."""
        theirs, ours = self.greedy()
        assert ours == theirs
        assert len({tuple(ids) for ids in ours}) > 1


def double(model: Any) -> Any:
    """In float64, with its routers, whose scores are float32 otherwise."""
    for module in model.modules():
        if hasattr(module, "classifier"):
            module.dtype = torch.float64
    return model.double()


def check_way_back(pair: Pair) -> None:
    """Check that the way back gives every tensor and the configuration."""
    config = pair.theirs.config.to_dict()
    written, tensors = to_published(pair.ours, like=config)
    published = FAMILIES[config["model_type"]].published(pair.theirs.state_dict())
    assert set(tensors) == set(published)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, published[name]), name
    assert from_published(written, tensors)[0] == pair.architecture
    again = type(pair.theirs.config)(**written).to_dict()
    # What they derive from other values, and may be said in several ways.
    derived = {"dtype", "architectures", "transformers_version", "encoder_sparse_step", "decoder_sparse_step"}
    differing = {
        name: (config[name], again[name])
        for name in config.keys() - derived
        if again[name] != config[name] and not (config[name] and math.isclose(again[name], config[name]))
    }
    assert not differing


def check_saved(pair: Pair, folder: Path) -> None:
    """Check that either reads what the other saves."""
    dtype = next(pair.ours.parameters()).dtype
    pair.theirs.save_pretrained(folder / "theirs")
    save_pretrained(pair.ours, folder / "ours", like=folder / "theirs")
    theirs, info = type(pair.theirs).from_pretrained(folder / "ours", dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert set(theirs.state_dict()) == set(pair.theirs.state_dict())
    for loaded, expected in ((load_pretrained(folder / "theirs", dtype), pair.ours), (theirs, pair.theirs)):
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, expected.state_dict()[name]), name


def check_own(model: Any, their_class: Any, folder: Path) -> Pair:
    """Check that transformers computes with a model that was built here and saved."""
    save_pretrained(model.eval(), folder)
    pair = Pair.of(their_class.from_pretrained(folder).eval())
    torch.testing.assert_close(*pair.logits(), rtol=1e-5, atol=2e-4)
    return pair
