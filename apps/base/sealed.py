"""ONNX files that end in a digest of all preceding bytes, so that a damaged file raises an error.

Weights in a separate file next to it, ``NAME.onnx.data``, have a digest too, which precedes the file's own.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

KEY = "moesaic.sha256"
"""The entry of a file's metadata that holds its digest, the last one of the file."""
DATA_KEY = "moesaic.data.sha256"
"""The entry before it, which holds the digest of the file of weights; only where there is one."""
_DIGITS = 64
_CHUNK = 1 << 20


def _head(key: str) -> bytes:
    """Return the bytes before the digits: field 14 of ONNX's ModelProto is an entry of the metadata."""
    entry = b"\x0a" + bytes([len(key)]) + key.encode() + b"\x12" + bytes([_DIGITS])
    return b"\x72" + bytes([len(entry) + _DIGITS]) + entry


def weights_file(path: Path) -> Path:
    """Return the path of an ONNX file's weights, if they are too large for it."""
    return path.with_name(f"{path.name}.data")


def seal(path: Path) -> None:
    """Append the digest of an ONNX file to it, after the digest of its weights file if it has one.

    The fields of a protocol buffer may come in any order, so that every reader takes the file as it did before.
    """
    if weights_file(path).is_file():
        _append(path, DATA_KEY, weights_file(path))
    _append(path, KEY, path)


def _append(path: Path, key: str, of: Path) -> None:
    digest = _digest(of, of.stat().st_size)
    with path.open("ab") as file:
        file.write(_head(key) + digest.encode())


def check_seal(path: Path) -> str:
    """Return the digest that an ONNX file ends in, which covers the weights file.

    Raises:
        OSError: a file cannot be read.
        ValueError: it has no digest, or its digest or the weights' does not match the content.
    """
    size = path.stat().st_size
    own = _entry(path, KEY, size)
    if own is None:
        raise ValueError(f"{path} is cut, or moesaic export has not written it: it does not end in a digest")
    size -= len(_head(KEY)) + _DIGITS
    if own != _digest(path, size):
        raise ValueError(f"{path} is damaged: it is not as moesaic export has written it")
    weights, data = _entry(path, DATA_KEY, size), weights_file(path)
    if weights is not None and not data.is_file():
        raise ValueError(f"{path} has its weights in {data.name} beside it, and that file is not there")
    if weights is not None and weights != _digest(data, data.stat().st_size):
        raise ValueError(f"{data} is cut or damaged: it is not as moesaic export has written it")
    return own


def weights_beside(path: Path) -> Path | None:
    """Return the file of weights that a sealed file speaks of; None if it speaks of none, or is none."""
    before = path.stat().st_size - len(_head(KEY)) - _DIGITS
    is_own = _entry(path, KEY, path.stat().st_size) is not None and _entry(path, DATA_KEY, before) is not None
    return weights_file(path) if is_own else None


def _entry(path: Path, key: str, end: int) -> str | None:
    """Return the digest of an entry that ends at a byte of a file; None if something else is there."""
    head = _head(key)
    begin = end - len(head) - _DIGITS
    if begin < 0:
        return None
    with path.open("rb") as file:
        file.seek(begin)
        entry = file.read(end - begin)
    return entry[len(head) :].decode("ascii", "replace") if entry.startswith(head) else None


def _digest(path: Path, size: int) -> str:
    """Return the SHA-256 of a file's first bytes, in hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (chunk := file.read(min(size, _CHUNK))):
            digest.update(chunk)
            size -= len(chunk)
    return digest.hexdigest()
