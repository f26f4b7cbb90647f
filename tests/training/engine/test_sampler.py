"""Epoch sampler: permutations, ranks, repeats and resuming."""

from resbackbone.training.engine import EpochSampler


def test_each_epoch_is_another_permutation():
    sampler = EpochSampler(range(100), seed=3)
    first = list(sampler)
    assert sorted(index.item for index in first) == list(range(100))
    assert first == list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert [index.item for index in second] != [index.item for index in first]
    assert not {index.seed for index in first} & {index.seed for index in second}
    assert list(EpochSampler(range(100), seed=4)) != first


def test_skip():
    sampler = EpochSampler(range(10), seed=0)
    whole = list(sampler)
    sampler.skip(4)
    assert list(sampler) == whole[4:]
    assert list(sampler) == whole


def test_ranks_share_an_epoch(monkeypatch):
    whole = list(EpochSampler(range(10), seed=0))
    ranks = []
    for rank in range(3):
        monkeypatch.setattr("resbackbone.training.engine.sampler.get_dist_info", lambda rank=rank: (rank, 3))
        ranks.append(EpochSampler(range(10), seed=0))
    parts = [list(sampler) for sampler in ranks]
    assert [len(part) for part in parts] == [len(sampler) for sampler in ranks] == [4, 4, 4]
    together = [index for turn in zip(*parts, strict=True) for index in turn]
    assert [index.item for index in together] == [index.item for index in whole + whole[:2]]
    assert len({index.seed for index in together}) == 12
    ranks[1].skip(3)
    assert list(ranks[1]) == parts[1][3:]


def test_num_repeats():
    draws = list(EpochSampler(range(10), seed=0, num_repeats=3))
    assert len(draws) == 10
    items = [index.item for index in draws]
    assert len(set(items)) == 4
    assert items[0] == items[1] == items[2] != items[3]
    assert len({index.seed for index in draws}) == 10
