"""The command ``moesaic init``: look at the data, write the configuration, and say what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from apps.base.files import delete, write_text
from apps.base.progress import bar
from apps.base.quiet import quiet
from apps.data.given import GivenConfig, GivenData
from apps.init.commented import Keys, commented
from apps.init.options import InitOptions
from apps.task.task import config_of

ADVICE = {
    "num_experts": "more of them hold more, at the same cost per token",
    "top_k": "experts per token; 1 is cheaper",
    "moe_blocks": "blocks with experts",
    "expert.init_args.hidden_dims": "width of an expert",
    "expert.init_args.hidden_dim": "width of an expert",
    "embedding.dim": "numbers per category",
    "lr": "tune it first: a third, and three times as much",
    "batch_size": "halve it if memory runs out",
    "tokens_per_batch": "halve it if memory runs out",
    "image_size": "pixels; larger sees more and is slower",
    "vocab_size": "subwords; 8,000 or more for a million lines",
    "val_size": "lines that validate",
    "test_size": "lines that test",
    "max_epochs": "the epoch that validates best is kept",
}
"""What to change, by the end of a value's place in the configuration."""


def run(options: InitOptions) -> int:
    """Write a configuration, and print what was found and the next commands.

    Returns:
        0.

    Raises:
        ValueError: data that no app knows, or that cannot be used; nothing is written then.
    """
    first, *more = options.target or (None,)
    given = GivenData(
        options.data, first, options.folder, None, (), options.time, options.user, True, tuple(map(str, more))
    )
    try:
        with quiet(own_notes=False), bar("looking at the data"):
            made = config_of(given)
        for option in ("target", "time", "user"):
            if getattr(options, option) and "table" not in made.config["data"]["init_args"]:
                raise ValueError(f"--{option} names a column, and {options.data[0]} is no table")
        write_text(options.file, text_of(made, options))
    except BaseException:
        delete(options.folder)
        raise
    written = f"{options.file}, {options.folder} (links)" if options.folder.is_dir() else options.file
    said = [*made.notes, *(f"check: {warning}" for warning in made.warnings), f"written: {written}; next:"]
    print("\n".join([*said, *(f"  {line}" for line in next_commands(made, options))]))
    return 0


def next_commands(made: GivenConfig, options: InitOptions) -> tuple[str, str, str]:
    """Return the commands to train, to test, and to compare sparse and dense models."""
    compared = options.file if made.verdict is None else shlex.join((str(options.data[0]), *made.verdict))
    return (
        f"moesaic fit --config {options.file}",
        f"moesaic test --ckpt_path runs/{options.file.stem}",
        f"moesaic verdict {compared} --minutes 30",
    )


def text_of(made: GivenConfig, options: InitOptions) -> str:
    """Return the file: a header, and the configuration with comments."""
    head = [
        "A first configuration, written by moesaic init.",
        "",
        *(f"  {line}" for line in next_commands(made, options)),
        "",
    ]
    head += made.notes
    config = {"seed_everything": 0, **made.config}
    places = list(_places(config))
    advice = {keys: text for keys in places for end, text in ADVICE.items() if f".{'.'.join(keys)}".endswith(f".{end}")}
    body = commented(config, {**advice, **made.comments}, made.above)
    return "".join(f"# {line}".rstrip() + "\n" for line in head) + body


def _places(value: Mapping[str, Any], path: Keys = ()) -> Iterator[Keys]:
    for key, own in value.items():
        yield (*path, key)
        if isinstance(own, Mapping):
            yield from _places(own, (*path, key))
