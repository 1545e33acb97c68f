"""``HubTextData``: texts and chats for a model of transformers, in its own tokens."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from apps.base.checks import check_at_least
from apps.base.progress import each
from apps.data.array_files import ArrayFiles, ArrayWriter
from apps.data.documents import documents_in, holds_rows, rows_in
from apps.data.splits import SPLITS, Split, count_of, hold_out
from apps.data.store import EncodedStore, identity
from apps.data.suite_data import SuiteData
from apps.data.text_files import named_files, text_lines
from apps.hub.folders import load_tokenizer
from apps.hub.packing import packed, pieces

STORE = EncodedStore("hub_text", ("hub/data.py", "data/splits.py", "data/documents.py", "data/text_files.py"))
IGNORED = -100
"""The label of a token without a loss, as transformers has it."""
_TOKENIZERS = ("*token*", "chat_template*", "vocab*", "merges*", "*.model", "*.tiktoken")
"""Files of a folder that decide which tokens a text has."""
_TWENTIETH = 0.05


class HubBatch(NamedTuple):
    """B rows of L tokens. A row holds whole documents one after the other, and parts of longer ones, or one of these.

    Attributes:
        tokens_BL: int64 ids; padding at the end of a row has the id 0.
        labels_BL: int64, the ids again, or ``IGNORED``: padding, and what a chat's user says.
        positions_BL: int64, from 0 in each document. Tokens attend within their document.
        valid_BL: bool, False for padding.
        index_B: int64 (B,), the row's place in its split.
    """

    tokens_BL: Tensor
    labels_BL: Tensor
    positions_BL: Tensor
    valid_BL: Tensor
    index_B: Tensor  # type: ignore[assignment]  # a batch has no use for tuple.index


class HubTextData(SuiteData):
    """Texts and chats in train, validation and test batches of ``HubBatch``, tokenized by a model's own tokenizer.

    Files are plain text (``.txt`` and others), JSON lines (``.jsonl``) or Parquet: each row has ``text``, or
    ``messages`` with ``role`` and ``content``, or ``prompt`` and ``completion``, which are two messages, and one text
    where the tokenizer has no chat template. The loss is then on the assistant's answers alone. Documents are packed
    into rows of ``block_size`` tokens, longest first, and do not see each other: a model that lets them is rejected
    before the training.

    Args:
        folder: local folder of a model in transformers' layout, which is trained and whose tokenizer reads the texts.
        train_files: a name or a pattern of files, or several.
        val_files: likewise; None: documents of train_files are held out, of a single one its end.
        test_files: likewise; None: the validation documents.
        root: folder that the file names start from.
        cache_dir: folder for encoded text; default ~/.cache/moesaic.
        document: unit of plain text that is one document: "line", "paragraph" (lines up to an empty one) or "file".
        val_size: documents to validate on, or a share of all below 1, at least one, without val_files.
        split_seed: of the held-out documents.
        block_size: tokens of a row.
        packed: a row holds as many documents as fit; False: one, as models need that do not keep them apart.
        batch_size: rows of a training batch and process.
        eval_batch_size: in validation and test.
        text: prompts of a prediction.
        predict_file: text file with a prompt in each line, in place of ``text``.
        kwargs: ``num_workers`` and ``seed`` of ``SuiteData``.

    Raises:
        ValueError: an option out of its range; when the data are first needed: a folder without a tokenizer, missing or
            malformed files, ``messages`` without a chat template.

    Example::

        data = HubTextData("models/OLMoE", train_files="chats.jsonl", block_size=1024, batch_size=4)
    """

    unit = "tokens"
    from_checkpoint = places = ("folder",)
    hold_out = "give {split}_files, or a val_size that holds some out"

    def __init__(
        self,
        folder: str,
        train_files: list[str] | str | None = None,
        val_files: list[str] | str | None = None,
        test_files: list[str] | str | None = None,
        root: str | None = None,
        cache_dir: str | None = None,
        document: Literal["line", "paragraph", "file"] = "paragraph",
        val_size: int | float = _TWENTIETH,
        split_seed: int = 0,
        block_size: int = 512,
        packed: bool = True,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        text: list[str] | str | None = None,
        predict_file: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__("text", root, cache_dir, batch_size=batch_size, eval_batch_size=eval_batch_size, **kwargs)
        check_at_least(2, block_size=block_size)
        self.folder = str(Path(folder).expanduser().absolute())
        self.document, self.block_size, self.packed = document, block_size, packed
        self.train_files, self.val_files, self.test_files = train_files, val_files, test_files
        self.val_size, self.split_seed, self.text, self.predict_file = val_size, split_seed, text, predict_file
        if text is not None and predict_file is not None:
            raise ValueError(f"text={text!r} and predict_file={predict_file!r}: give one of them")
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The folder's tokenizer, read when it is first asked for."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.folder)
        return self._tokenizer

    @property
    def needs_no_dataset(self) -> bool:
        return self.text is not None or self.predict_file is not None

    def sizes(self) -> dict[Split, int]:
        return {split: len(self.opened[f"{split}_ids"]) for split in SPLITS}

    def examples(self, split: Split) -> _Rows:
        return _Rows(self.opened, split, self.block_size, self.packed)

    def predict_dataloader(self) -> Any:
        if not self.needs_no_dataset:
            raise ValueError("there is nothing to continue: give text (--data.text) or predict_file")
        if self.predict_file is not None:
            prompts = list(text_lines(Path(self.predict_file).expanduser()))
            empty = next((i for i, prompt in enumerate(prompts, 1) if not prompt.strip()), None)
            if empty is not None:
                raise ValueError(f"{self.predict_file}:{empty} is empty: each line is a prompt")
        else:
            prompts = [self.text] if isinstance(self.text, str) else self.text or []
        return DataLoader(prompts, collate_fn=list)  # type: ignore[arg-type]

    def read(self) -> ArrayFiles:
        if self.train_files is None and self.test_files is None and self.val_files is None:
            raise ValueError("train_files is missing (--data.train_files): a name or pattern of text or .jsonl files")
        files = {split: named_files(self.root, getattr(self, f"{split}_files")) for split in SPLITS}
        folder = Path(self.folder)
        tokenizer = sorted({path for pattern in _TOKENIZERS for path in folder.glob(pattern) if path.is_file()})
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in tokenizer)).hexdigest()
        made_from = [
            {split: identity(paths) for split, paths in files.items()},
            [digest, self.document, self.val_size, self.split_seed],
        ]
        return STORE.open(self.cache, "text", made_from, lambda writer: self._write(writer, files))

    def _write(self, writer: ArrayWriter, files: Mapping[Split, Sequence[Path]]) -> None:
        splits = {split: [d for path in paths for d in self._documents(path)] for split, paths in files.items()}
        held = ""
        if not files["val"] and splits["train"]:
            splits["train"], splits["val"], held = self._held_out(splits["train"])
        if not files["test"]:
            splits["test"] = splits["val"]
        for split, documents in splits.items():
            ids, answers, bounds = array("i"), array("b"), [0]  # lists of numbers would take eight times the memory
            for document in each(documents, f"tokens of {len(documents):,} documents"):
                own, answered = self._encoded(document)
                ids.extend(own)
                answers.extend(answered)
                bounds.append(len(ids))
            writer.save(f"{split}_ids", np.array(ids, np.int32))
            writer.save(f"{split}_answers", np.array(answers, np.int8))
            writer.save(f"{split}_bounds", np.array(bounds, np.int64))
        writer.finish({"held": held})

    def _held_out(self, documents: list[Any]) -> tuple[list[Any], list[Any], str]:
        """Return the documents to train on and to validate on, for a share at least one, and a line on these."""
        (where, text), is_share = documents[0], 0 < self.val_size < 1
        if len(documents) == 1 and isinstance(text, str) and len(text) > 1 and is_share:
            at = min(round(len(text) * (1 - self.val_size)), len(text) - 1)
            cut = max(text.rfind(" ", 0, at + 1), text.rfind("\n", 0, at + 1), 0) or at
            held = f"; the last {1 - cut / len(text):.1%} of the only document are held out to validate on"
            return [(where, text[:cut])], [(where, text[cut:].lstrip(" \n"))], held
        number: dict[str, int] = {}  # the same text is in one split only
        group_N = np.array([number.setdefault(json.dumps(text), len(number)) for _, text in documents])
        least = int(np.bincount(group_N).min()) if is_share and len(number) > 1 else 0
        size = max(count_of(self.val_size, len(group_N)), least)
        chosen = set(hold_out(group_N, [size], self.split_seed)[0].tolist())
        train, val = ([d for i, d in enumerate(documents) if (i in chosen) == is_held] for is_held in (False, True))
        return train, val, f"; {len(val):,} of {len(documents):,} documents are held out to validate on"

    def describe(self) -> str:
        return f"{super().describe()}{self.opened.info['held']}"

    def _documents(self, path: Path) -> Iterator[tuple[str, Any]]:
        """Yield the documents of a file, each with where it is."""
        if not holds_rows(path) and path.suffix != ".json":
            yield from ((str(path), "\n".join(lines)) for lines in documents_in(path, self.document))
            return
        for where, row in rows_in(path, ("text", "messages", "prompt", "completion")):
            content = _content(row)
            if not isinstance(content, (str, tuple)) and not _are_messages(content):
                raise ValueError(
                    f'{where} has no "text", no "prompt" and "completion", no "messages" of role and content'
                )
            yield where, content

    def _encoded(self, document: tuple[str, Any]) -> tuple[list[int], list[bool]]:
        """Return the ids of a document, and which of them have a loss."""
        where, content = document
        tokenizer = self.tokenizer
        if isinstance(content, tuple) and tokenizer.chat_template:
            content = [{"role": role, "content": t} for role, t in zip(("user", "assistant"), content, strict=True)]
        if isinstance(content, (str, tuple)):
            prompt, text = content if isinstance(content, tuple) else ("", content)
            ids, asked = ([*tokenizer(t, add_special_tokens=False)["input_ids"]] for t in (prompt + text, prompt))
            first = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
            last = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
            while ids[: len(asked)] != asked:  # its last token may be another one where the completion follows
                asked.pop()
            known = len(first) + len(asked) if prompt else 0
            ids = [*first, *ids, *last]
            return ids, [False] * known + [True] * (len(ids) - known)
        if not tokenizer.chat_template:
            raise ValueError(f"{where} has messages, and {self.folder} no chat template")
        whole, answers = self._chat(content), list[bool]()
        for i, message in enumerate(content):
            if message["role"] == "assistant":
                begin = self._chat(content[:i], asks=True)
                end = end_of_answer(whole, begin, self._chat(content[: i + 1]))
                if end is None:
                    raise ValueError(f"{where}: the chat template of {self.folder} changes what was said before")
                answers += [False] * (len(begin) - len(answers)) + [True] * (end - len(begin))
        return whole, answers + [False] * (len(whole) - len(answers))

    def _chat(self, messages: Sequence[Any], asks: bool = False) -> list[int]:
        ids: list[int] = self.tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=asks, return_dict=False
        )
        return ids


def end_of_answer(whole: list[int], begin: list[int], until: list[int]) -> int | None:
    """Return where an answer ends in a chat; None: the template changes what was said before.

    Of all answers but the last, templates leave thoughts out (Qwen3), or close them with another token (GPT-OSS).

    Args:
        whole: the chat.
        begin: the chat before the answer, with the words that ask for it.
        until: the chat with the answer as its last message.
    """
    start = len(begin)
    if whole[:start] != begin or until[:start] != begin:
        return None
    for k in range(start, len(until)):
        length = len(until) - k
        if whole[start] == until[k] and whole[start : start + length] == until[k:]:
            return start + length
    length = len(until) - 1 - start
    return start + length + 1 if length and whole[start : start + length] == until[start:-1] else None


def _content(entry: Mapping[str, Any]) -> Any:
    """Return a line's text, its messages, or both of its prompt and its completion."""
    if isinstance(entry.get("prompt"), str) and isinstance(entry.get("completion"), str):
        return entry["prompt"], entry["completion"]
    return entry.get("messages", entry.get("text"))


def _are_messages(content: Any) -> bool:
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in content)
    )


class _Rows(Dataset[Any]):
    """The rows of a split, read by whole batches."""

    def __init__(self, files: ArrayFiles, split: str, size: int, are_packed: bool) -> None:
        self.files, self.split, self.size, self.are_packed = files, split, size, are_packed
        self.bounds = files[f"{split}_bounds"].tolist()
        lengths = np.diff(self.bounds).tolist()
        self.rows = packed(lengths, size) if are_packed else [[piece] for piece in pieces(lengths, size)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> HubBatch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int] | Tensor) -> HubBatch:
        index_B = torch.as_tensor(positions, dtype=torch.int64)
        ids_M, answers_M = self.files[f"{self.split}_ids"], self.files[f"{self.split}_answers"]
        rows = [self.rows[row] for row in index_B.tolist()]
        longest = max(end - start for row in rows for _, start, end in row)
        size = self.size if self.are_packed else longest
        shape = (len(rows), size)
        tokens_BL = torch.zeros(shape, dtype=torch.int64)
        labels_BL, positions_BL = torch.full(shape, IGNORED), torch.zeros(shape, dtype=torch.int64)
        valid_BL = torch.zeros(shape, dtype=torch.bool)
        for b, row in enumerate(rows):
            place = 0
            for d, start, end in row:
                span = slice(place, place + end - start)
                own = slice(self.bounds[d] + start, self.bounds[d] + end)
                tokens_BL[b, span] = ids_M[own].long()
                labels_BL[b, span] = torch.where(answers_M[own] > 0, tokens_BL[b, span], IGNORED)
                labels_BL[b, place] = IGNORED  # nothing before it foretells it
                positions_BL[b, span] = torch.arange(end - start)
                place += end - start
            positions_BL[b, place:] = torch.arange(size - place)
            valid_BL[b, :place] = True
        return HubBatch(tokens_BL, labels_BL, positions_BL, valid_BL, index_B)
