"""Pairs, augmentations and their independence of everything but seed, epoch and sample."""

from __future__ import annotations

import pytest
import torch

from ffcl_fast.train.batches import EpochSampler, Views, augmentation, derive_seed, loader, scaled
from ffcl_fast.train.data import Split


@pytest.fixture
def split(rng) -> Split:
    return Split(torch.randint(0, 256, (40, 1, 8, 8), generator=rng, dtype=torch.uint8), torch.arange(40) % 3)


def epoch(split: Split, seed: int, workers: int = 0) -> list[list[torch.Tensor]]:
    views = Views(split, augmentation("flips", 8), "pairs", seed)
    return list(loader(views, EpochSampler(len(split), 16, 0, seed), workers, pin=False))


def test_a_pair_has_target_one_only_for_equal_classes(split):
    plain = Views(split, None, "pairs", 3)
    partners = set()
    for index in range(len(split)):
        first, second, target = plain[index]
        assert torch.equal(first, split.images[index])
        other = next(i for i in range(len(split)) if torch.equal(second, split.images[i]))
        partners.add(other)
        assert target == (1 if split.labels[index] == split.labels[other] else -1)
    assert len(partners) > 15  # drawn over the whole split, not one neighbour


def test_the_same_seed_gives_the_same_batches_for_any_number_of_workers(split):
    one, two, other = epoch(split, 5), epoch(split, 5, workers=2), epoch(split, 6)
    assert all(torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True))
    assert not all(torch.equal(x[0], y[0]) for x, y in zip(one, other, strict=True))


def test_batches_do_not_depend_on_what_was_drawn_before(split):
    one = epoch(split, 5)
    torch.rand(1000)
    assert torch.equal(one[1][1], epoch(split, 5)[1][1])


def test_views_of_an_epoch_differ_from_the_next(split):
    views = [Views(split, augmentation("flips", 8), "pairs", derive_seed(0, "local", epoch)) for epoch in (1, 2)]
    assert any(not torch.equal(views[0][i][1], views[1][i][1]) for i in range(8))


def test_flips_only_rearrange_pixels_and_reach_all_eight_positions():
    image = torch.arange(9, dtype=torch.uint8).reshape(1, 3, 3)
    augment = augmentation("flips", 3)
    seen = {tuple(augment(image).flatten().tolist()) for _ in range(400)}
    assert len(seen) == 8 and all(sorted(s) == list(range(9)) for s in seen)


def test_shift_moves_by_a_pixel_and_none_changes_nothing():
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    image[0, 4, 4] = 255
    where = {tuple(augmentation("shift", 8)(image)[0].nonzero()[0].tolist()) for _ in range(300)}
    assert where == {(y, x) for y in (3, 4, 5) for x in (3, 4, 5)}
    assert torch.equal(augmentation("none", 8)(image), image)


def test_scaling_uses_each_images_own_range():
    images = torch.tensor([[10, 20, 30, 10], [7, 7, 7, 7], [0, 255, 0, 0]], dtype=torch.uint8).reshape(3, 1, 2, 2)
    expected = torch.tensor([[0, 0.5, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]]).reshape(3, 1, 2, 2)
    assert torch.equal(scaled(images), expected)


@pytest.mark.parametrize(("count", "batch", "samples"), [(10, 3, 0), (10, 4, 0), (11, 5, 0), (10, 3, 6), (1, 4, 0)])
def test_an_epoch_visits_each_sample_once_and_leaves_no_single_one(count, batch, samples):
    sampler = EpochSampler(count, batch, samples, seed=1)
    visited = [index for indices in sampler for index in indices]
    assert len(visited) == len(set(visited)) == (samples or count) and len(sampler) == len(list(sampler))
    assert count == 1 or all(len(indices) > 1 for indices in sampler)


def test_a_cut_epoch_draws_other_samples_each_time():
    drawn = {tuple(i for b in EpochSampler(100, 8, 16, seed) for i in b) for seed in range(5)}
    assert len(drawn) == 5
    assert [i for b in EpochSampler(5, 2) for i in b] == [0, 1, 2, 3, 4]  # validation: in order
