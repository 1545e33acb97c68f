"""Inputs of several requests make one batch; a bad one fails alone, and nobody waits for ever."""

from __future__ import annotations

import threading

import pytest

from apps.serve.service.batching import Batcher, Broken


def doubled(inputs):
    return [2 * x for x in inputs]


def test_requests_share_a_batch_and_keep_their_order():
    sizes = []
    batcher = Batcher(doubled, most=4, wait=0.05, watch=lambda size, seconds: sizes.append(size))
    answers = [batcher.submit([1]), batcher.submit([2, 3]), batcher.submit([4, 5, 6])]
    assert len(batcher) == 6
    batcher.start()
    assert [answer.result(5) for answer in answers] == [[2], [4, 6], [8, 10, 12]]
    batcher.stop()
    assert sizes == [4, 2]  # 1 2 3 4, then 5 6


def test_an_input_that_fails_fails_its_own_request_alone():
    calls = []

    def inverted(inputs):
        calls.append(list(inputs))
        return [1 / x for x in inputs]

    batcher = Batcher(inverted, most=4, wait=0.05)
    good, bad = batcher.submit([1, 2]), batcher.submit([4, 0])
    batcher.start()
    assert good.result(5) == [1, 0.5]
    with pytest.raises(ZeroDivisionError):
        bad.result(5)
    assert calls == [[1, 2, 4, 0], [1], [2], [4], [0]]
    batcher.stop()
    assert not batcher.broken


def test_too_few_answers_are_none_and_a_fatal_error_is_not_tried_again():
    batcher = Batcher(lambda inputs: [1], most=4, wait=0.05)
    both, one = batcher.submit([1, 2]), batcher.submit([3])
    batcher.start()
    assert (both.result(5), one.result(5)) == ([1, 1], [1])  # each alone
    batcher.stop()
    calls = []

    def fails(inputs):
        calls.append(len(inputs))
        raise RuntimeError("device lost")

    batcher = Batcher(fails, most=2, wait=0.05, is_fatal=lambda error: "lost" in str(error))
    answer = batcher.submit([1, 2])
    batcher.start()
    with pytest.raises(Broken):
        answer.result(5)
    batcher.stop()
    assert calls == [2]


def test_what_breaks_the_model_is_told_to_all_who_wait():
    computing, go_on = threading.Event(), threading.Event()

    def breaks(inputs):
        computing.set()
        go_on.wait(5)
        raise SystemExit

    told = threading.Event()
    batcher = Batcher(breaks, most=1, wait=0, on_broken=told.set)
    batcher.start()
    at_work = batcher.submit([1])
    computing.wait(5)
    waiting = batcher.submit([2])
    go_on.set()
    for answer in (at_work, waiting):
        with pytest.raises(Broken, match="the model has broken down"):
            answer.result(5)
    assert told.wait(5)
    assert batcher.broken
    with pytest.raises(Broken, match="not at work"):
        batcher.submit([3])
    batcher.stop()


def test_stop_answers_what_waits():
    batcher = Batcher(doubled, most=2, wait=60)
    answers = [batcher.submit([x]) for x in range(5)]
    batcher.start()
    batcher.stop()
    assert [answer.result(0) for answer in answers] == [[0], [2], [4], [6], [8]]
    with pytest.raises(Broken):
        batcher.submit([1])


def test_an_abandoned_request_is_not_computed():
    computed = []
    batcher = Batcher(lambda inputs: computed.extend(inputs) or doubled(inputs), most=4, wait=0.05)
    kept, left = batcher.submit([1, 2]), batcher.submit([3, 4, 5])
    batcher.abandon(left)
    assert len(batcher) == 2
    batcher.start()
    assert kept.result(5) == [2, 4]
    batcher.abandon(kept)  # its answer is there
    batcher.stop()
    assert computed == [1, 2]
