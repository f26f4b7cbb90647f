"""Background threads: results in order, within the memory limit, errors where they belong."""

import threading
import time

import pytest
import torch

from resbackbone.extraction.prefetch import prefetch, write_behind


class TestPrefetch:
    def read(self, items, read=lambda item: item, *, num_threads=3, max_bytes=10, nbytes=lambda result: 1):
        return prefetch(items, read, num_threads=num_threads, max_bytes=max_bytes, nbytes=nbytes)

    def test_everything_comes_in_order(self):
        def read(item):
            time.sleep(0.001 * (item % 5))
            return -item

        assert list(self.read(range(100), read)) == [-item for item in range(100)]
        assert list(self.read([])) == []

    @pytest.mark.parametrize(("weight", "most"), [(1, 10 + 3), (4, 3 + 3), (1000, 1 + 3)])
    def test_it_reads_while_nobody_asks_but_no_more_than_the_limit(self, weight, most):
        begun = []
        results = self.read(range(100), lambda item: begun.append(item) or item, nbytes=lambda result: weight)
        for taken in range(3):
            assert next(results) == taken
            time.sleep(0.1)
            ahead = len(begun) - (taken + 1)
            assert (10 // weight or 1) <= ahead <= most
        assert list(results) == list(range(3, 100))

    def test_an_error_comes_where_its_item_would(self):
        results = self.read([3, 1, 0, 2], lambda item: 6 // item)
        assert [next(results), next(results)] == [2, 6]
        with pytest.raises(ZeroDivisionError):
            next(results)

    def test_nothing_is_read_once_the_consumer_has_left(self):
        begun = []
        results = self.read(range(1000), lambda item: begun.append(item) or time.sleep(0.01), max_bytes=1000)
        next(results)
        results.close()
        count = len(begun)
        time.sleep(0.1)
        assert len(begun) == count < 500

    def test_background_threads_compute_alone_and_leave_the_main_one_its_own(self):
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            assert set(self.read(range(6), lambda item: torch.get_num_threads())) == {1}
            assert torch.get_num_threads() == 3
        finally:
            torch.set_num_threads(before)


class TestWriteBehind:
    def test_everything_comes_in_order_and_waits_within_the_limit(self):
        writing, most = threading.Semaphore(0), []

        def items():
            for item in range(20):
                most.append(item - len(done))
                writing.release()
                yield item

        def write(item):
            writing.acquire()
            time.sleep(0.002)
            return -item

        done = []
        for result in write_behind(items(), write, num_threads=2, max_bytes=3, nbytes=lambda item: 1):
            done.append(result)
        assert done == [-item for item in range(20)]
        assert 1 < max(most) <= 4

    def test_an_error_is_raised_here(self):
        with pytest.raises(ZeroDivisionError):
            list(write_behind([1, 0], lambda item: 1 / item, num_threads=1, max_bytes=9, nbytes=lambda item: 1))
