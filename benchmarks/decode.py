"""Sentences a second of beam search: ours and that of transformers, on the same weights; and what batch pruning gives.

Beam 5, 32 sentences a batch, float32, on a CPU. A model of transformers is made with random weights and read as ours
(``apps.porting``). Both decode the same number of steps: no sentence may end earlier. Each round times each system
once, in turn, and ratios are taken within a round.

For pruning, sentences end at lengths that are spread as those of image captions, and all 32 begin together.

    moesaic bench decode
    moesaic bench decode --experts 64 --peers switch --rounds 9
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apps.base.machine import machine_line
from apps.data.subwords import EOS_ID, PAD_ID
from apps.nets.transformer import TranslationModel
from apps.nlp.decode import DecodeConfig, translate_ids
from apps.porting import from_published
from apps.porting.vocabulary import Vocabulary

LAYERS, DIM, HIDDEN, HEADS, VOCAB = 4, 128, 256, 4, 8000
"""The size "tiny", for encoder and decoder each. Every second layer is sparse, with experts as wide as the FFNs."""

SENTENCES, BEAM, SOURCE, TARGET = 32, 5, 16, 20
SPREAD = 0.37
"""Standard deviation of the log of a caption's length in subwords."""

NAMES = {"switch": "transformers SwitchTransformers", "nllb": "transformers NLLB-MoE"}


@dataclass(frozen=True)
class Pair:
    """Two models of the same weights; ``vocabulary`` leads from our ids to theirs."""

    theirs: Any
    ours: TranslationModel
    vocabulary: Vocabulary


def build(peer: str, num_experts: int) -> Pair:
    """Make a model of transformers with random weights, and ours with the same ones."""
    import transformers

    shared = {"vocab_size": VOCAB, "d_model": DIM, "num_experts": num_experts, "tie_word_embeddings": False}
    shared |= {"expert_capacity": 1 << 30, "encoder_sparse_step": 2, "decoder_sparse_step": 2}
    torch.manual_seed(0)
    if peer == "switch":
        config = transformers.SwitchTransformersConfig(
            **shared,
            **{"d_kv": DIM // HEADS, "d_ff": HIDDEN, "num_heads": HEADS},
            **{"num_layers": LAYERS, "num_decoder_layers": LAYERS},
            **{"num_sparse_encoder_layers": LAYERS // 2, "num_sparse_decoder_layers": LAYERS // 2},
            decoder_start_token_id=3,
        )
        theirs = transformers.SwitchTransformersForConditionalGeneration(config)
    else:
        sides = {"attention_heads": HEADS, "ffn_dim": HIDDEN, "layers": LAYERS}
        config = transformers.NllbMoeConfig(
            **shared, **{f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in sides.items()}
        )
        theirs = transformers.NllbMoeForConditionalGeneration(config)
    theirs.eval()
    for name, weight in theirs.named_parameters():
        if "router" in name:  # tokens go to many experts, as balance losses make them
            nn.init.normal_(weight, std=3 * DIM**-0.5)
    with torch.no_grad():
        # The output varies from sentence to sentence, and the end is never among the best.
        head = theirs.lm_head.weight
        head.normal_(std=2 * DIM**-0.5)
        head[config.eos_token_id] = 0.0
    architecture, weights = from_published(config.to_dict(), theirs.state_dict())
    ours = architecture.build().eval()
    ours.load_state_dict(weights)
    assert isinstance(ours, TranslationModel)
    return Pair(theirs, ours, architecture.vocabulary)


def sources(lengths: list[int]) -> Tensor:
    """Return random sentences that end in EOS_ID, in our ids."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.full((len(lengths), max(lengths)), PAD_ID)
    for row, n in zip(rows, lengths, strict=True):
        row[: n - 1] = torch.randint(8, VOCAB, (n - 1,), generator=generator)
        row[n - 1] = EOS_ID
    return rows


def our_run(pair: Pair, source_BS: Tensor, config: DecodeConfig) -> Callable[[], Any]:
    return lambda: translate_ids(pair.ours, source_BS, config)


def their_run(pair: Pair, source_BS: Tensor) -> Callable[[], Any]:
    ids = pair.vocabulary.theirs[source_BS]
    # TARGET ids, and one step more, in which ours gives the end.
    steps = {"min_new_tokens": TARGET + 1, "max_new_tokens": TARGET + 1}

    def run() -> Any:
        with torch.inference_mode():
            return pair.theirs.generate(ids, attention_mask=torch.ones_like(ids), num_beams=BEAM, **steps)

    return run


def their_run_to(pair: Pair, source_BS: Tensor, lengths: list[int]) -> Callable[[], Any]:
    """Return a run in which each sentence ends after as many ids as it has, and the batch with its longest."""
    ids, end = pair.vocabulary.theirs[source_BS], pair.theirs.config.eos_token_id
    limit_R1 = torch.tensor(lengths).repeat_interleave(BEAM)[:, None]

    def only_at_the_end(input_ids: Tensor, scores: Tensor) -> Tensor:
        is_end_R1 = input_ids.shape[1] - 1 >= limit_R1
        end_R1 = scores[:, end : end + 1].clone()
        scores[:, end] = -math.inf
        scores.masked_fill_(is_end_R1, -math.inf)
        scores[:, end : end + 1] = torch.where(is_end_R1, end_R1, -math.inf)
        return scores

    def run() -> Any:
        with torch.inference_mode():
            return pair.theirs.generate(
                ids,
                attention_mask=(source_BS != PAD_ID).long(),
                num_beams=BEAM,
                max_new_tokens=max(lengths) + 1,
                logits_processor=[only_at_the_end],
            )

    return run


def caption_lengths() -> list[int]:
    """Return 32 lengths at equal distances in probability, in an order by chance; their median is about 15."""
    normal = statistics.NormalDist()
    quantiles = [normal.inv_cdf((i + 0.5) / SENTENCES) for i in range(SENTENCES)]
    order = torch.randperm(SENTENCES, generator=torch.Generator().manual_seed(0)).tolist()
    return [round(15 * math.exp(SPREAD * quantiles[i])) for i in order]


def timed(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round; one round before them warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def rows_of(seconds: dict[str, list[float]], base: str) -> list[dict[str, Any]]:
    """Return the quartiles of each system's sentences a second, and of their ratio to those of ``base``."""
    rows = []
    for name, times in seconds.items():
        rate = quartiles([SENTENCES / s for s in times])
        ratio = quartiles([b / s for b, s in zip(seconds[base], times, strict=True)])
        rows.append({"system": name, "sentences_per_second": rate, "ratio": ratio})
    return rows


def arguments(program: str, doc: str | None, argv: list[str] | None) -> argparse.Namespace:
    """Read the options of a benchmark beside transformers, and set the threads."""
    parser = argparse.ArgumentParser(prog=program, description=(doc or "").split("\n\n")[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64], help="E of the sparse layers")
    parser.add_argument("--peers", nargs="+", choices=sorted(NAMES), default=["switch", "nllb"])
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, after one warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--json", type=Path, help="write all rows to this file too")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.threads < 1:
        parser.error(f"--rounds {args.rounds} and --threads {args.threads} must be at least 1")
    torch.set_num_threads(args.threads)
    try:
        import transformers
    except ImportError:
        parser.error("this benchmark needs transformers, which is no part of moesaic: pip install transformers")
    transformers.logging.set_verbosity_error()
    print(f"{machine_line()}, transformers {transformers.__version__}\n")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments("decode", __doc__, argv)
    equal = DecodeConfig(num_beams=BEAM, min_new_tokens=TARGET, max_length_ratio=0.0, max_length_extra=TARGET)
    spread = DecodeConfig(num_beams=BEAM, max_length_ratio=1.0, max_length_extra=0)
    lengths = caption_lengths()
    print(f"{SENTENCES} sentences of {SOURCE} ids to {TARGET} ids, beam {BEAM}; 4 + 4 layers, D={DIM}, F={HIDDEN}")
    print("\n| E | system | sentences/s (quartiles) | moesaic over it |\n|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    for peer in args.peers:
        for num_experts in args.experts:
            pair, source_BS = build(peer, num_experts), sources([SOURCE] * SENTENCES)
            ours = f"moesaic, weights of {peer}"
            runs = {ours: our_run(pair, source_BS, equal), NAMES[peer]: their_run(pair, source_BS)}
            measured = rows_of(timed(runs, args.rounds), NAMES[peer])
            low, mid, high = measured[0]["ratio"]
            for row in measured:
                a, b, c = row["sentences_per_second"]
                over = f"{mid:.2f}x ({low:.2f}-{high:.2f})" if row["system"] == NAMES[peer] else ""
                print(f"| {num_experts} | {row['system']} | {b:.1f} ({a:.1f}-{c:.1f}) | {over} |", flush=True)
            rows += [{"experts": num_experts, **row} for row in measured]
    mean = sum(lengths) / len(lengths)
    print(f"\n{SENTENCES} sentences of {min(lengths)} to {max(lengths)} ids, {mean:.0f} on average, to as many")
    print("\n| E | system | sentences/s (quartiles) | batch pruning over it |\n|---|---|---|---|")
    for num_experts in args.experts:
        pair, source_BS = build("switch", num_experts), sources(lengths)
        runs = {
            "moesaic, batch pruning": our_run(pair, source_BS, spread),
            "moesaic, no pruning": our_run(pair, source_BS, replace(spread, prune=False)),
            NAMES["switch"]: their_run_to(pair, source_BS, lengths),
        }
        seconds = timed(runs, args.rounds)
        for name in runs:
            row = rows_of(seconds, name)
            (a, b, c) = next(r["sentences_per_second"] for r in row if r["system"] == name)
            low, mid, high = row[0]["ratio"]
            over = f"{mid:.2f}x ({low:.2f}-{high:.2f})" if name != row[0]["system"] else ""
            print(f"| {num_experts} | {name} | {b:.1f} ({a:.1f}-{c:.1f}) | {over} |", flush=True)
        rows += [{"experts": num_experts, **row} for row in rows_of(seconds, NAMES["switch"])]
    if args.json:
        args.json.write_text(json.dumps({"machine": machine_line(), "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
