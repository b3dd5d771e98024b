import numpy as np
import pytest

from finetune.scores.statistics import bootstrap_means, holm, interval, p_value, rank_correlation

scipy_stats = pytest.importorskip("scipy.stats")


def rows(*, num_rows=400, effect=0.0, seed=0):
    """Two cells that share the hard rows; the second is better by `effect`. (rows, 2)"""
    random = np.random.default_rng(seed)
    hard = random.normal(50, 20, num_rows)
    return np.stack([hard + random.normal(0, 3, num_rows), hard + effect + random.normal(0, 3, num_rows)], axis=1)


def compare(values, **settings):
    resampled = bootstrap_means(values, tasks=np.zeros(len(values), int), **settings)
    difference = resampled[:, 1] - resampled[:, 0]
    return difference, float((values[:, 1] - values[:, 0]).mean())


def test_the_spread_of_a_mean_is_its_standard_error():
    values = rows()
    resampled = bootstrap_means(values, tasks=np.zeros(400, int))
    assert resampled.mean(axis=0) == pytest.approx(values.mean(axis=0), abs=0.05)
    assert resampled.std(axis=0) == pytest.approx(values.std(axis=0) / 20, rel=0.03)


def test_the_interval_agrees_with_scipy():
    values = rows()[:, 0]
    theirs = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=1
    ).confidence_interval
    ours = interval(bootstrap_means(values[:, None], tasks=np.zeros(400, int))[:, 0])
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.1)


@pytest.mark.parametrize("effect", [0.0, 0.2, 0.4, 0.6])
def test_the_p_value_agrees_with_the_paired_t_test(effect):
    values = rows(effect=effect)
    differences, observed = compare(values)
    expected = scipy_stats.ttest_rel(values[:, 1], values[:, 0]).pvalue
    assert p_value(differences, observed=observed) == pytest.approx(expected, rel=0.25, abs=0.01)


def test_far_tails_are_not_cut_at_the_number_of_resamples():
    values = rows(effect=5.0)
    differences, observed = compare(values, num_resamples=1000)
    assert p_value(differences, observed=observed) < 1e-20


def test_pairing_finds_what_the_separate_intervals_hide():
    values = rows(effect=1.0)
    resampled = bootstrap_means(values, tasks=np.zeros(400, int))
    (_, high), (low, _) = interval(resampled[:, 0]), interval(resampled[:, 1])
    assert low < high  # they overlap widely
    assert p_value(resampled[:, 1] - resampled[:, 0], observed=1.0) < 0.01


def test_tasks_count_equally_and_are_resampled_by_themselves():
    values = np.concatenate([np.full((10, 1), 0.0), np.full((1000, 1), 100.0)])
    tasks = np.array([0] * 10 + [1] * 1000)
    assert set(bootstrap_means(values, tasks=tasks, num_resamples=50)[:, 0]) == {50.0}


@pytest.mark.parametrize(("difference", "expected"), [(0.0, 1.0), (2.0, 0.0)])
def test_rows_that_all_differ_equally(difference, expected):
    assert p_value(np.full(1000, difference), observed=difference) == expected


def test_resamples_depend_only_on_the_seed():
    values, tasks = rows(), np.zeros(400, int)
    first, again, other = (bootstrap_means(values, tasks=tasks, num_resamples=5, seed=seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_holm_under_the_null_rarely_finds_anything():
    found = 0
    for seed in range(200):
        p_values = np.random.default_rng(seed).uniform(size=10)
        found += min(holm(list(p_values))) < 0.05
    assert found <= 20  # 5 % of 200, and chance


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlation_agrees_with_scipy(seed):
    random = np.random.default_rng(seed)
    left, right = (list(random.integers(0, 5, 8).astype(float)) for _ in range(2))
    assert rank_correlation(left, right) == pytest.approx(scipy_stats.spearmanr(left, right).statistic)


def test_rank_correlation_needs_three_different_values():
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
    assert rank_correlation([3, 1, 2], [30, 10, 20]) == pytest.approx(1)
