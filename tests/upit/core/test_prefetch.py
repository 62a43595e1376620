"""Working ahead: everything once, in order, bounded, and errors come through."""

import threading

import pytest

from upit.core.prefetch import ahead


def test_results_come_in_order_from_other_threads():
    threads = set()

    def double(x):
        threads.add(threading.get_ident())
        return 2 * x

    assert list(ahead(double, range(20))) == [2 * x for x in range(20)]
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("waiting", [1, 4])
def test_never_more_than_a_few_are_taken_ahead(waiting):
    taken = []

    def items():
        for i in range(10):
            taken.append(i)
            yield i

    results = ahead(lambda x: x, items(), workers=2, waiting=waiting)
    for i, result in enumerate(results):
        assert result == i
        assert len(taken) == min(10, i + 2 + waiting)


def test_an_error_comes_through():
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda x: 1 // x, [1, 0, 2]))


def test_what_nobody_takes_is_not_computed():
    begun, go_on = [], threading.Event()

    def wait(x):
        begun.append(x)
        go_on.wait(10)

    results = ahead(lambda x: x and wait(x), range(50), workers=1, waiting=40)
    next(results)
    threading.Timer(0.2, go_on.set).start()
    results.close()
    assert begun == [1]
