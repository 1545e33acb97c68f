import gzip
import io

import pytest

from apps.inflate import Inflated, read_limited


def _zeros(count):
    """A gzip of ``count`` zero bytes, which deflate shrinks about 1,000 times."""
    return gzip.compress(bytes(count))


def test_what_unpacks_to_little_is_read_whatever_its_ratio():
    packed = _zeros(1 << 20)  # about 1 KiB
    assert read_limited(gzip.open(io.BytesIO(packed)), len(packed), "zeros.gz") == bytes(1 << 20)


def test_a_file_far_larger_than_it_explains_is_refused_while_it_is_read():
    packed = _zeros(10 << 20)
    stream = Inflated(gzip.open(io.BytesIO(packed)), len(packed), "zeros.gz", free=1 << 20, most=50)
    count = 0
    with pytest.raises(ValueError, match=r"^zeros\.gz is compressed over \d+ times .* at most 50 times is read"):
        while piece := stream.read(1 << 16):
            count += len(piece)
    # The limit is the larger of 1 MiB and 50 times some 10 KiB: far from the 10 MiB that the file holds.
    assert (1 << 20) - (1 << 16) <= count <= (1 << 20)


def test_a_ratio_within_the_limit_is_read_to_the_end():
    packed = gzip.compress(bytes(range(256)) * 4096)
    stream = io.BufferedReader(Inflated(gzip.open(io.BytesIO(packed)), len(packed), "x.gz", free=0, most=2000))
    assert stream.read() == bytes(range(256)) * 4096
