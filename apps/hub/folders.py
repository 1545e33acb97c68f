"""Local folders of models in transformers' layout: their models, tokenizers and what is written back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from apps.base.checks import check_installed
from apps.base.files import folder_beside, put_folder
from apps.porting.files import CONFIG, Safetensors, read_json


def checked_folder(folder: str | Path) -> Path:
    """Return a folder that holds a model's configuration.

    Raises:
        ValueError: there is none. Nothing is fetched from elsewhere.
    """
    path = Path(folder).expanduser()
    if not (path / CONFIG).is_file():
        raise ValueError(f"{folder} is no folder of a model of transformers: it has no {CONFIG}")
    return path


def _transformers() -> Any:
    check_installed("a model of a hub's folder", ["transformers"], "hub")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_model(folder: str | Path, dtype: str | None = None) -> Any:
    """Return the causal language model of a folder, in evaluation.

    Args:
        folder: with ``config.json`` and safetensors. Code in it is not run.
        dtype: of the weights, such as "bfloat16"; None: as the folder has them.

    Raises:
        ValueError: a folder without weights, a damaged one, or a model that transformers does not know by itself.
    """
    path = checked_folder(folder)
    transformers = _transformers()
    kind = read_json(path / CONFIG).get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise ValueError(f"{folder}: transformers {transformers.__version__} knows no model_type {kind!r}")
    if not (files := sorted(path.glob("*.safetensors"))):
        raise ValueError(f"{folder} has no weights: no file of safetensors")
    for file in files:
        Safetensors(file)  # names a file that is cut, which transformers does not
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype or "auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # named below
            output_loading_info=True,
        )
    except Exception as error:  # of transformers, of safetensors, of torch
        raise ValueError(f"{folder} cannot be read: {str(error).strip().splitlines()[0]}") from error
    bad = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if bad:
        raise ValueError(f"{folder} is damaged: {bad[0]} is missing or has another shape, the first of {len(bad)}")
    return model.eval()


def load_tokenizer(folder: str | Path) -> Any:
    """Return the tokenizer of a folder.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = checked_folder(folder)
    transformers = _transformers()
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise ValueError(f"{folder} has no tokenizer: no tokenizer.json")
    try:
        return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"the tokenizer of {folder} cannot be read: {str(error).strip().splitlines()[0]}") from error


def teller(tokenizer: Any, tell: Callable[[str], None]) -> Any:
    """Return a streamer of ``generate`` that tells the text so far each time it grows."""
    transformers = _transformers()

    class Teller(transformers.TextStreamer):  # type: ignore[name-defined, misc]
        whole = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.whole += text
            tell(self.whole)

    return Teller(tokenizer, skip_prompt=True, skip_special_tokens=True)


def save_model(model: nn.Module, folder: str | Path, source: str | Path | None = None, **options: Any) -> None:
    """Write a model, which no longer is adopted, as a folder in transformers' layout, whole or not at all.

    Args:
        model: of transformers.
        folder: replaced if it is there.
        source: folder whose tokenizer goes with it.
        options: of ``save_pretrained``.
    """
    target: Any = model
    with folder_beside(Path(folder)) as temporary:
        target.save_pretrained(temporary, **options)
        if source is not None:
            load_tokenizer(source).save_pretrained(temporary)
        put_folder(temporary, Path(folder))
