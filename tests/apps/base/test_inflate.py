import gzip
import io

import pytest

from apps.base.inflate import Inflated, read_limited


def _zipped(data):
    """A stream that unpacks a gzip of ``data``, and the gzip's size."""
    packed = gzip.compress(data)
    return gzip.GzipFile(fileobj=io.BytesIO(packed)), len(packed)


def test_what_unpacks_to_little_is_read_whatever_its_ratio():
    # Deflate shrinks zeros about 1,000 times.
    assert read_limited(*_zipped(bytes(1 << 20)), "zeros.gz") == bytes(1 << 20)


def test_a_file_far_larger_than_it_explains_is_refused_while_it_is_read():
    stream = Inflated(*_zipped(bytes(10 << 20)), "zeros.gz", free=1 << 20, most=50)
    count = 0
    with pytest.raises(ValueError, match=r"^zeros\.gz is compressed over \d+ times .* at most 50 times is read"):
        while piece := stream.read(1 << 16):
            count += len(piece)
    # The limit is the larger of 1 MiB and 50 times some 10 KiB: far from the 10 MiB that the file holds.
    assert (1 << 20) - (1 << 16) <= count <= (1 << 20)


def test_a_ratio_within_the_limit_is_read_to_the_end():
    data = bytes(range(256)) * 4096
    assert io.BufferedReader(Inflated(*_zipped(data), "x.gz", free=0, most=2000)).read() == data
