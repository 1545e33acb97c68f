"""Tokens a second of training a sparse translation model: ours and those of transformers, from the same weights.

The models of ``benchmarks/decode.py``: 4 + 4 layers, D=128, F=256, V=8,000, every second layer sparse. A step is
forward, cross-entropy, backward and a fused AdamW step over ready-made batches without padding, in float32; nothing is
dropped. Ours has its balance losses, theirs have none. Each round times each system once, in turn; ratios are taken
within a round.

    moesaic bench train_translation
    moesaic bench train_translation --experts 64 --peers nllb --rounds 9
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import core
from apps.base.machine import machine_line
from apps.bench import load
from apps.nets.loss import linear_cross_entropy

decode = load("decode")

SENTENCES, LENGTH, STEPS = 64, 24, 4
"""The sentences of a batch, the ids of each side, and the steps of a round."""


def our_run(pair: Any, source_BS: Tensor, target_BL: Tensor) -> Callable[[], Any]:
    model = pair.ours.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        for _ in range(STEPS):
            with core.record(model) as tape:
                h_BLD = model.decode(target_BL[:, :-1], model.encode(source_BS)) * model.config.logits_scale
                loss = linear_cross_entropy(h_BLD.flatten(0, 1), model.output_weight, target_BL[:, 1:].flatten())
            optimizer.zero_grad()
            (loss + core.aux_loss(tape)).backward()
            optimizer.step()

    return run


def their_run(pair: Any, source_BS: Tensor, target_BL: Tensor) -> Callable[[], Any]:
    model, theirs = pair.theirs.train(), pair.vocabulary.theirs
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids, inputs, targets = theirs[source_BS], theirs[target_BL[:, :-1]], theirs[target_BL[:, 1:]]

    def run() -> None:
        for _ in range(STEPS):
            # Their own loss shifts nothing: logits of the token after each that is read.
            logits = model(input_ids=ids, decoder_input_ids=inputs).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def main(argv: list[str] | None = None) -> int:
    args = decode.arguments("train_translation", __doc__, argv)
    print(f"{SENTENCES} sentences of {LENGTH} ids on both sides; tokens of both sides\n")
    print("| E | system | thousand tokens/s (quartiles) | moesaic over it |\n|---|---|---|---|")
    source_BS, target_BL = decode.sources([LENGTH] * SENTENCES), decode.sources([LENGTH + 1] * SENTENCES)
    tokens, rows = STEPS * SENTENCES * 2 * LENGTH, []
    for peer in args.peers:
        for num_experts in args.experts:
            pair, ours = decode.build(peer, num_experts), f"moesaic, weights of {peer}"
            runs = {ours: our_run(pair, source_BS, target_BL)}
            runs[decode.NAMES[peer]] = their_run(pair, source_BS, target_BL)
            seconds = decode.timed(runs, args.rounds)
            low, mid, high = decode.quartiles(
                [their / our for our, their in zip(seconds[ours], seconds[decode.NAMES[peer]], strict=True)]
            )
            for name, times in seconds.items():
                a, b, c = decode.quartiles([tokens / s / 1e3 for s in times])
                over = "" if name == ours else f"{mid:.2f}x ({low:.2f}-{high:.2f})"
                print(f"| {num_experts} | {name} | {b:.2f} ({a:.2f}-{c:.2f}) | {over} |", flush=True)
                rows.append({"experts": num_experts, "system": name, "thousand_tokens_per_second": [a, b, c]})
    if args.json:
        args.json.write_text(json.dumps({"machine": machine_line(), "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
