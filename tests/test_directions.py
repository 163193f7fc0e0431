"""Directions: what the estimators recover, what the scores mean, what is read, and what is refused."""

import dataclasses
import json
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from command_line import run
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_checkpoints import write_directions as write_random_directions
from raw_checkpoints import write_dump, write_llama, write_shard
from safetensors.numpy import load_file, save_file

from ablate_shards.errors import AblateError, ActivationsError, DirectionsError, UsageError
from ablate_shards.surgery.directions import activations, compare, estimate
from ablate_shards.surgery.directions.activations import open_activations
from ablate_shards.surgery.directions.compare import Candidate, compare_directions
from ablate_shards.surgery.directions.directions import (
    Directions,
    LayerScore,
    apply_gain,
    biproject,
    score_row,
    score_table,
)
from ablate_shards.surgery.directions.estimate import EstimatorOptions, compute_directions
from ablate_shards.surgery.directions.formats import read_directions, write_directions
from ablate_shards.surgery.directions.without import read_without

HIDDEN = 24
MEAN = EstimatorOptions()
MEDIAN = EstimatorOptions("geometric-median")
SVD = EstimatorOptions("svd")
ESTIMATORS = [MEAN, MEDIAN, SVD, EstimatorOptions(winsorize=0.95)]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def unit(vector):
    return vector / np.linalg.norm(vector)


def orthonormal(rows):
    return np.linalg.qr(rows.T)[0].T


def dump(path, positive, negative, *, dtype=np.float32):
    """Writes one layer, or a list of layers, of activations."""
    layers = zip(positive, negative, strict=True) if isinstance(positive, list) else [(positive, negative)]
    tensors = {}
    for layer, pair in enumerate(layers):
        for label, values in zip(("positive", "negative"), pair, strict=True):
            tensors[f"{label}.layers.{layer}"] = np.ascontiguousarray(values, dtype)
    save_file(tensors, path, {"format": "ablate-shards.activations/1"})
    return path


def compute(path, options=MEAN, **keywords):
    return compute_directions(open_activations(path), options, **keywords)


def planted(seed=0, *, pairs=60, size=HIDDEN, gap=4.0):
    """Returns paired activations that differ along one direction, and that direction."""
    concept = unit(normal(size, seed=seed))
    shared = normal(pairs, size, seed=seed + 1) * 2 + normal(size, seed=seed + 2) * 3
    positive = shared + gap * concept + normal(pairs, size, seed=seed + 3) * 0.3
    return positive, shared + normal(pairs, size, seed=seed + 4) * 0.3, concept


@pytest.mark.parametrize("options", ESTIMATORS)
def test_a_planted_direction_is_recovered(tmp_path, options):
    positive, negative, concept = planted()
    found = compute(dump(tmp_path / "dump.safetensors", positive, negative), options)
    assert found.basis[0].shape == (1, HIDDEN)
    assert found.basis[0].dtype == np.float32
    assert found.basis[0][0] @ concept > 0.99
    assert found.reference[0].dtype == np.float32
    assert json.loads(found.metadata["estimator"]) == dataclasses.asdict(options)
    # The other way round, it is the other sign.
    turned = compute(dump(tmp_path / "dump.safetensors", negative, positive), options)
    assert turned.basis[0][0] @ concept < -0.99


def test_means_and_scores_are_those_of_plain_arithmetic(tmp_path):
    positive, negative = normal(23, HIDDEN, seed=1) + 0.5, normal(17, HIDDEN, seed=2)
    found = compute(dump(tmp_path / "dump.safetensors", positive, negative, dtype=np.float64))
    score = found.scores[0]
    means = positive.mean(0), negative.mean(0)
    gap = means[0] - means[1]
    along = {label: [] for label in "+-"}
    for fold in range(5):
        rest = [np.delete(values, slice(fold, None, 5), axis=0).mean(0) for values in (positive, negative)]
        for label, values in (("+", positive), ("-", negative)):
            along[label] += list((values[fold::5] - (rest[0] + rest[1]) / 2) @ unit(rest[0] - rest[1]))
    above, below = np.array(along["+"]), np.array(along["-"])
    halves = [unit(positive[half::2].mean(0) - negative[half::2].mean(0)) for half in (0, 1)]
    wanted = LayerScore(
        layer=0,
        cosine=unit(means[0]) @ unit(means[1]),
        contrast=np.linalg.norm(gap) / max(map(np.linalg.norm, means)),
        purity=np.sqrt(1 - (unit(gap) @ unit(means[1])) ** 2),
        signal_to_noise=(above.mean() - below.mean()) / np.sqrt((above.var(ddof=1) + below.var(ddof=1)) / 2),
        auc=(above[:, None] > below).mean(),
        split_half=halves[0] @ halves[1],
    )
    np.testing.assert_array_equal(found.basis[0][0], unit(gap).astype(np.float32))
    np.testing.assert_array_equal(found.reference[0], means[1].astype(np.float32))
    for name, value in score_row(wanted).items():
        assert getattr(score, name) == pytest.approx(value, rel=1e-12), name


def test_the_geometric_median_resists_outliers(tmp_path):
    positive, negative, concept = planted()
    positive[:2] += 4000 * unit(normal(HIDDEN, seed=9))
    path = dump(tmp_path / "dump.safetensors", positive, negative)
    assert abs(compute(path).basis[0][0] @ concept) < 0.3
    assert compute(path, MEDIAN).basis[0][0] @ concept > 0.99


def test_winsorising_resists_spikes(tmp_path):
    positive, negative, concept = planted(size=200, gap=12)
    positive[::20, 3] = 3000
    path = dump(tmp_path / "dump.safetensors", positive, negative)
    assert compute(path).basis[0][0] @ concept < 0.2
    assert compute(path, EstimatorOptions(winsorize=0.98)).basis[0][0] @ concept > 0.97


def test_winsorising_clips_each_prompt_at_its_own_quantile(tmp_path):
    positive, negative = normal(30, HIDDEN) + 1, normal(30, HIDDEN, seed=1) * 7
    limits = [np.quantile(np.abs(values), 0.75, axis=1)[:, None] for values in (positive, negative)]
    clipped = [np.clip(values, -limit, limit) for values, limit in zip((positive, negative), limits, strict=True)]
    found = compute(
        dump(tmp_path / "a.safetensors", positive, negative, dtype=np.float64), EstimatorOptions(winsorize=0.75)
    )
    wanted = compute(dump(tmp_path / "b.safetensors", *clipped, dtype=np.float64))
    np.testing.assert_array_equal(found.basis[0], wanted.basis[0])
    np.testing.assert_array_equal(found.reference[0], wanted.reference[0])
    assert found.scores == wanted.scores


@pytest.mark.parametrize("shape", ["round", "outliers", "a point in the middle", "half in one point"])
def test_the_geometric_median_is_one(tmp_path, shape):
    """No point has a smaller mean distance to the prompts."""
    values = normal(41, HIDDEN)
    if shape == "outliers":
        values[:4] += 1e4
    elif shape == "a point in the middle":
        values = np.exp(1.5 * values)
        values[0] = values[1:].mean(0)
    elif shape == "half in one point":
        values[:22] = 1.0
    opposite = np.zeros((1, HIDDEN))
    found = compute(dump(tmp_path / "dump.safetensors", values, opposite, dtype=np.float64), MEDIAN).basis[0][0]

    def mean_distance(point):
        return np.linalg.norm(values - point, axis=1).mean()

    point = values.mean(0)
    for _ in range(2000):
        weight = 1 / np.maximum(np.linalg.norm(values - point, axis=1), 1e-9)
        point = weight @ values / weight.sum()
    along = min(mean_distance(length * found) for length in np.linspace(0.5, 1.5, 2001) * (point @ found))
    assert along <= mean_distance(point) * (1 + 1e-5)
    assert mean_distance(values.mean(0)) > mean_distance(point) * (1 + 1e-4)


@pytest.mark.parametrize("pairs", [20, 50], ids=["Gram of pairs", "Gram of features"])
def test_svd_recovers_a_planted_plane(tmp_path, pairs):
    size = 30
    plane = orthonormal(normal(2, size))
    shared = normal(pairs, size, seed=1) * 5
    positive = shared + (normal(pairs, 2, seed=2) * [3, 2] + [0, 6]) @ plane + normal(pairs, size, seed=3) * 0.05
    path = dump(tmp_path / "dump.safetensors", positive, shared, dtype=np.float64)

    found = compute(path, EstimatorOptions("svd", rank=2)).basis[0].astype(np.float64)

    np.testing.assert_allclose(found @ found.T, np.eye(2), atol=1e-6)
    assert np.linalg.svd(found @ plane.T, compute_uv=False)[-1] > 0.99
    assert (found @ (positive - shared).mean(0) > 0).all()
    exact = np.linalg.svd(positive - shared)[2][:2]
    np.testing.assert_allclose(np.abs((found * exact).sum(1)), 1, atol=1e-6)
    # One direction cannot span the plane, and centring first would have lost the mean.
    assert np.linalg.norm(compute(path).basis[0] @ plane.T) < 1.01
    centred = positive - shared - (positive - shared).mean(0)
    assert abs(np.linalg.svd(centred)[2][0] @ exact[0]) < 0.99


@pytest.mark.parametrize("pairs", [35, 60], ids=["Gram of pairs", "Gram of features"])
def test_svd_is_scored_by_the_vectors_of_what_was_not_held_out(tmp_path, pairs):
    size = 40
    shared, concept = normal(pairs, size, seed=1) * 3, unit(normal(size))
    gaps = 4 * concept + normal(pairs, size, seed=2)
    score = compute(dump(tmp_path / "dump.safetensors", shared + gaps, shared, dtype=np.float64), SVD).scores[0]
    vectors = []
    for kept in [np.arange(pairs) % 5 != fold for fold in range(5)] + [np.arange(pairs) % 2 == half for half in (0, 1)]:
        first = np.linalg.svd(gaps[kept])[2][0]
        vectors.append((first * np.sign(first @ gaps[kept].mean(0)), kept))
    assert score.split_half == pytest.approx(vectors[5][0] @ vectors[6][0], rel=1e-10)
    along = [], []
    for vector, kept in vectors[:5]:
        middle = (shared + gaps / 2)[kept].mean(0)
        for values, found in zip((shared + gaps, shared), along, strict=True):
            found.extend((values[~kept] - middle) @ vector)
    above, below = map(np.array, along)
    signal = (above.mean() - below.mean()) / np.sqrt((above.var(ddof=1) + below.var(ddof=1)) / 2)
    assert score.signal_to_noise == pytest.approx(signal, rel=1e-10)


@pytest.mark.parametrize("gap", [2.0, 1e-3, 0.0], ids=["far", "near", "none"])
def test_the_leading_eigenvector_is_found_whatever_the_gap(monkeypatch, gap):
    basis = orthonormal(normal(60, 60))
    values = np.concatenate([[1 + gap], np.linspace(1, 0.9, 59)])
    gram, computed = basis.T * values @ basis, []
    eigh = np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda matrix: computed.append(len(matrix)) or eigh(matrix))
    found = estimate._leading(gram, basis[:8].T + normal(60, 8, seed=1) * 0.05)
    assert np.linalg.norm(gram @ found - values[0] * found) < 1e-11
    assert np.linalg.norm(found) == pytest.approx(1)
    # All of them are computed only where the search takes too long.
    assert (60 in computed) == (gap < 2)


def test_held_out_scores_do_not_flatter(tmp_path):
    """Far more features than prompts separate any labels in sample."""
    held_out = []
    for seed in range(20):
        values = normal(40, 2000, seed=seed)
        found = compute(dump(tmp_path / "dump.safetensors", values[:20], values[20:]))
        along = values @ found.basis[0][0]
        assert along[:20].min() > along[20:].max(), "the in-sample area is 1"
        held_out.append(found.scores[0])
    assert abs(np.mean([score.auc for score in held_out]) - 0.5) < 0.06
    assert abs(np.mean([score.signal_to_noise for score in held_out])) < 0.3
    assert abs(np.mean([score.split_half for score in held_out])) < 0.05


def test_pairs_stay_together_in_folds(tmp_path):
    """What only a pair shares must not leak from one of it to the other."""
    pairs, size = 20, 40
    shared, concept = 10 * np.eye(pairs, size), np.eye(1, size, size - 1) + normal(pairs, size) * 1e-4
    together = compute(dump(tmp_path / "a.safetensors", shared + concept, shared)).scores[0]
    apart = compute(dump(tmp_path / "b.safetensors", shared + concept, np.roll(shared, 1, axis=0))).scores[0]
    assert together.auc == 1
    assert together.signal_to_noise > 1e3
    assert apart.auc < 0.5


@pytest.mark.parametrize("options", [*ESTIMATORS, EstimatorOptions("svd", rank=2)])
def test_several_files_are_one(tmp_path, options):
    positive, negative, _ = planted(pairs=37)
    whole = compute(dump(tmp_path / "whole.safetensors", positive, negative), options)
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, (start, end) in enumerate([(0, 1), (1, 20), (20, 37)]):
        dump(folder / f"{number}.safetensors", positive[start:end], negative[start:end])
    joined = compute(folder, options)
    assert joined.sha256() == whole.sha256()
    assert joined.scores == whole.scores


@pytest.mark.parametrize("options", [*ESTIMATORS, EstimatorOptions("svd", rank=2)])
def test_chunks_and_threads_change_nothing_that_matters(tmp_path, monkeypatch, options):
    positive, negative, _ = planted(pairs=83)
    path = dump(tmp_path / "dump.safetensors", [positive, negative, positive], [negative, positive, -negative])
    whole = compute(path, options)
    monkeypatch.setattr(estimate, "_WORKERS", 1)
    alone = compute(path, options)
    assert alone.sha256() == whole.sha256()
    assert alone.scores == whole.scores
    monkeypatch.setattr(activations, "_CHUNK_BYTES", 1)
    sizes = {len(chunk) for chunk in open_activations(path).chunks(0, "positive", multiple=10)}
    assert sizes == {10, 3}
    chunked = compute(path, options)
    for layer in range(3):
        np.testing.assert_allclose(chunked.basis[layer], whole.basis[layer], atol=1e-6)
        for name, value in score_row(whole.scores[layer]).items():
            assert getattr(chunked.scores[layer], name) == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("options", [MEAN, MEDIAN, SVD, EstimatorOptions(winsorize=0.9)])
def test_memory_does_not_grow_with_the_dump(tmp_path, monkeypatch, options):
    monkeypatch.setattr(activations, "_CHUNK_BYTES", 64 << 10)
    monkeypatch.setattr(estimate, "_KEPT_BYTES", 64 << 10)
    monkeypatch.setattr(estimate, "_WEISZFELD_STEPS", 3)
    monkeypatch.setattr(estimate, "_WORKERS", 1)
    size, prompts, peaks = 64, 4000, []
    for count in (prompts // 10, prompts):
        rng = np.random.default_rng(0)
        tensors = {
            f"{label}.layers.0": rng.standard_normal((count, size)) + shift
            for label, shift in (("positive", 1), ("negative", 0))
        }
        write_shard(tmp_path / "dump.safetensors", tensors, "BF16", {"format": "ablate-shards.activations/1"})
        del tensors
        found = open_activations(tmp_path / "dump.safetensors")
        tracemalloc.start()
        compute_directions(found, options)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # What grows is a few numbers per prompt, of the 2 · size that a dump holds.
    assert peaks[1] - peaks[0] < prompts * size * 8 / 4
    assert peaks[1] < prompts * size * 8 / 2


def test_progress_is_told(tmp_path):
    positive, negative, _ = planted()
    told = []
    compute(
        dump(tmp_path / "dump.safetensors", [positive] * 3, [negative] * 3),
        progress=lambda *numbers: told.append(numbers),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("options", [MEAN, MEDIAN, SVD])
@pytest.mark.parametrize("prompts", [2, 3, 4, 6])
def test_few_prompts_are_scored(tmp_path, prompts, options):
    positive, negative, _ = planted(pairs=prompts)
    score = compute(dump(tmp_path / "dump.safetensors", positive, negative), options).scores[0]
    assert score.auc is not None
    assert np.isfinite(list(score_row(score).values())).all()


@pytest.mark.parametrize("options", [MEAN, MEDIAN, SVD])
def test_one_prompt_gives_a_direction_and_the_scores_of_the_means(tmp_path, options):
    positive, negative, _ = planted(pairs=1)
    found = compute(dump(tmp_path / "dump.safetensors", [positive] * 5, [negative] * 5), options)
    np.testing.assert_allclose(found.basis[0][0], unit(positive[0] - negative[0]), atol=1e-6)
    score = found.scores[0]
    assert (score.signal_to_noise, score.auc, score.split_half) == (None, None, None)
    assert score.purity > 0
    assert found.best_layer() in found.layers


def test_scores_are_known_where_nothing_spreads(tmp_path):
    """Prompts that are all alike have no noise to divide by."""
    found = compute(dump(tmp_path / "dump.safetensors", np.full((6, 4), 2.0), np.eye(1, 4).repeat(6, axis=0)))
    assert found.scores[0].signal_to_noise is None
    assert found.scores[0].auc == 1


def scored(*signals, purity=1.0, **other):
    scores = {
        layer: LayerScore(layer, cosine=0.5, contrast=1.0, purity=purity, signal_to_noise=signal, **other)
        for layer, signal in enumerate(signals)
    }
    basis = {layer: np.eye(1, 4, dtype=np.float32) for layer in scores}
    return Directions(basis, {}, scores)


def test_the_best_layer_is_past_the_middle_with_the_highest_signal_to_noise():
    assert scored(9, 9, 9, 9, 1, 2, 3, 2, 2, 9, 9).best_layer() == 9
    assert scored(9, 9, 9, 9, 1, 2, 3, 2, 2, 2, 9).best_layer() == 6
    assert scored(1, 2).best_layer() == 1
    assert scored(5).best_layer() == 0


def test_a_direction_along_the_reference_is_not_the_best():
    found = scored(*[1.0] * 11)
    scores = dict(found.scores)
    scores[5] = dataclasses.replace(scores[5], signal_to_noise=3.0, purity=0.1)
    scores[7] = dataclasses.replace(scores[7], signal_to_noise=1.1)
    assert dataclasses.replace(found, scores=scores).best_layer() == 7


def test_without_prompts_the_best_layer_is_that_of_the_means():
    """The estimate of llm-abliteration: ``snr * (1 - cos) * purity``, its snr being our contrast."""
    found = scored(*[None] * 11)
    scores = dict(found.scores)
    scores[6] = dataclasses.replace(scores[6], contrast=1.2)
    scores[7] = dataclasses.replace(scores[7], cosine=0.3)
    scores[8] = dataclasses.replace(scores[8], contrast=3.0, purity=0.1)
    scores[0] = dataclasses.replace(scores[0], contrast=9.0)
    assert dataclasses.replace(found, scores=scores).best_layer() == 7


def test_without_scores_the_best_layer_is_asked_for():
    found = dataclasses.replace(scored(1, 1), scores={})
    with pytest.raises(DirectionsError, match="choose with --source-layer N or own"):
        found.best_layer()
    alone = dataclasses.replace(scored(1), scores={})
    assert alone.best_layer() == 0


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(4, 40),
    rank=st.integers(1, 2),
    near=st.sampled_from([1.0, 1e-2, 1e-4]),
    seed=st.integers(0, 2**16),
)
def test_biprojection_leaves_nothing_along_the_references(size, rank, near, seed):
    basis = orthonormal(normal(rank, size, seed=seed))
    first = basis[0] + near * normal(size, seed=seed + 1)
    references = [first * 1000, normal(size, seed=seed + 2)] if size > rank + 2 else [first]
    assert any(abs(basis @ unit(reference)).max() > 1e-3 for reference in references), "nothing to remove before"

    found, left = biproject(basis, references)

    for reference in references:
        assert np.abs(found @ unit(reference)).max() < 1e-12
    np.testing.assert_allclose(found @ found.T, np.eye(rank), atol=1e-13)
    assert 0 < left <= 1 + 1e-12
    # What is left lies in the span of the directions and the references.
    span = orthonormal(np.vstack([basis, *map(unit, references)]))
    np.testing.assert_allclose(found, found @ span.T @ span, atol=1e-9)


def test_repeated_and_zero_references_do_not_matter():
    basis, reference = orthonormal(normal(2, HIDDEN)), normal(HIDDEN, seed=1)
    once, left = biproject(basis, [reference])
    rounded = reference.astype(np.float32)
    for references in ([reference, reference], [reference, -3 * reference, np.zeros(HIDDEN)], [reference, rounded]):
        again, left_again = biproject(basis, references)
        np.testing.assert_allclose(again, once, atol=1e-12)
        assert left_again == pytest.approx(left)
    same, left = biproject(basis, [np.zeros(HIDDEN)])
    np.testing.assert_allclose(same, basis, atol=1e-14)
    assert left == pytest.approx(1)


def test_a_direction_along_the_reference_is_refused():
    basis = orthonormal(normal(2, HIDDEN))
    with pytest.raises(DirectionsError, match="use --no-biproject or another --source-layer"):
        biproject(basis, [basis[0] - 2 * basis[1]])


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("centred", [False, True])
def test_the_gain_is_carried_through(rank, centred):
    """A norm multiplies what a weight writes by g, so R diag(g) is what must vanish from the weight."""
    basis, gain = orthonormal(normal(rank, HIDDEN)), 1 + normal(HIDDEN, seed=1)
    weight, inputs = normal(HIDDEN, 40, seed=2), normal(40, 9, seed=3)

    def left(axes):
        edited = weight - axes.T @ (axes @ weight)
        written = edited @ inputs
        return np.abs(basis @ (gain[:, None] * (written - centred * written.mean(axis=0)))).max()

    carried = apply_gain(basis, gain, centred=centred)
    np.testing.assert_allclose(carried @ carried.T, np.eye(rank), atol=1e-13)
    assert left(carried) < 1e-11
    assert left(basis) > 0.1


def test_a_gain_of_zero_is_refused():
    with pytest.raises(DirectionsError, match="leave it out with --layers"):
        apply_gain(np.eye(1, 4), np.array([0.0, 1, 1, 1]))
    with pytest.raises(DirectionsError, match="zero along a direction"):
        apply_gain(np.eye(1, 4), np.zeros(4))


def test_a_written_file_reads_the_same(tmp_path):
    positive, negative, _ = planted()
    found = compute(
        dump(tmp_path / "dump.safetensors", [positive] * 2, [negative, -negative]), EstimatorOptions("svd", 2)
    )
    path = tmp_path / "d.safetensors"
    write_directions(found, path)

    again = read_directions(path)

    assert again.sha256() == found.sha256()
    assert again.scores == found.scores
    assert again.metadata == found.metadata
    assert (again.layers, again.rank, again.hidden_size) == ((0, 1), 2, HIDDEN)
    assert score_table(again)[1] == score_row(found.scores[1])
    assert {name: values.dtype for name, values in load_file(path).items()} == {
        f"{kind}.layers.{layer}": np.float32 for kind in ("direction", "reference") for layer in (0, 1)
    }
    assert [item.name for item in tmp_path.iterdir() if item.name.startswith(".")] == []


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(OSError, match=r"d\.safetensors"):
        write_directions(scored(1), tmp_path / "d.safetensors")
    assert [item.name for item in tmp_path.iterdir()] == ["d.safetensors"]


def test_one_bit_changes_the_digest():
    basis, reference = {0: np.eye(1, 4, dtype=np.float32)}, {0: np.ones(4, np.float32)}
    digests = {Directions(basis, reference).sha256(), Directions(basis, {}).sha256()}
    for arrays in (basis, reference):
        changed = arrays[0].copy()
        changed.reshape(-1).view(np.uint8)[0] ^= 1
        digests.add(Directions(*({0: changed} if arrays is kind else kind for kind in (basis, reference))).sha256())
    digests.add(Directions({1: basis[0]}, {1: reference[0]}).sha256())
    digests.add(Directions({0: basis[0].reshape(2, 2)}, reference).sha256())
    assert len(digests) == 6
    assert Directions(dict(basis), dict(reference), metadata={"a": "b"}).sha256() in digests


def test_npz_and_foreign_lengths_are_read(tmp_path):
    rows = normal(2, HIDDEN)
    np.savez(tmp_path / "d.npz", **{"direction.layers.3": rows * 7, "reference.layers.3": rows[0]})
    found = read_directions(tmp_path / "d.npz")
    assert found.layers == (3,)
    assert found.basis[3][0] @ unit(rows[0]) == pytest.approx(1)
    np.testing.assert_allclose(found.basis[3] @ found.basis[3].T, np.eye(2), atol=1e-6)
    np.testing.assert_array_equal(found.reference[3], rows[0].astype(np.float32))


def measurements(path, count=6, **changes):
    content = {"layers": count}
    for index in range(count):
        harmful, harmless = (torch.from_numpy(normal(HIDDEN, seed=seed + index)).bfloat16() for seed in (0, 100))
        content |= {f"harmful_{index}": harmful, f"harmless_{index}": harmless, f"refuse_{index}": harmful - harmless}
    torch.save(content | changes, path)
    return content


def test_measurements_of_llm_abliteration_are_read_one_layer_earlier_and_scored(tmp_path):
    content = measurements(tmp_path / "m.refuse", refusenorm_3=torch.ones(HIDDEN))
    found = read_directions(tmp_path / "m.refuse")
    assert found.layers == (0, 1, 2, 3, 4)
    qualities = {}
    for layer in found.layers:
        harmful, harmless, refuse = (
            content[f"{kind}_{layer + 1}"].double() for kind in ("harmful", "harmless", "refuse")
        )
        assert found.basis[layer][0] @ unit(refuse.numpy()) == pytest.approx(1)
        np.testing.assert_array_equal(found.reference[layer], harmless.float().numpy())
        cosine = torch.cosine_similarity(harmful, harmless, dim=0)
        ratio = refuse.norm() / max(harmful.norm(), harmless.norm())
        axis = harmless / harmless.norm()
        purity = (refuse - (refuse @ axis) * axis).norm() / refuse.norm()
        score = found.scores[layer]
        assert (score.cosine, score.contrast, score.purity) == pytest.approx(
            (float(cosine), float(ratio), float(purity))
        )
        assert score.signal_to_noise is None
        qualities[layer] = float(ratio * (1 - cosine) * purity)
    assert found.best_layer() == max((2, 3), key=qualities.__getitem__)
    # The dump reader takes the same file, and finds the same.
    computed = compute(tmp_path / "m.refuse")
    assert computed.layers == found.layers
    assert computed.basis[2][0] @ found.basis[2][0] > 0.999


def test_measurements_without_means_have_directions_only(tmp_path):
    torch.save({"refuse_0": torch.ones(4), "refuse_1": torch.eye(4)[1] * 3}, tmp_path / "m.pt")
    found = read_directions(tmp_path / "m.pt")
    assert found.basis[0].tolist() == [[0, 1, 0, 0]]
    assert (found.reference, found.scores) == ({}, {})


def control_vector(path, tensors, architecture="controlvector"):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "llama")
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_control_vectors_belong_to_the_layer_they_are_added_to(tmp_path):
    vectors = {f"direction.{layer}": normal(HIDDEN, seed=layer).astype(np.float32) for layer in (2, 1, 10)}
    vectors["direction.1"] = vectors["direction.1"].astype(np.float16)
    found = read_directions(control_vector(tmp_path / "v.gguf", vectors))
    assert found.layers == (1, 2, 10)
    for layer in found.layers:
        assert found.basis[layer].shape == (1, HIDDEN)
        assert found.basis[layer][0] @ unit(vectors[f"direction.{layer}"].astype(np.float64)) == pytest.approx(1)
    assert (found.reference, found.scores) == ({}, {})


def test_other_gguf_files_are_refused(tmp_path):
    path = control_vector(tmp_path / "v.gguf", {"token_embd.weight": np.ones((4, 4), np.float32)}, "llama")
    assert "holds no directions" in unreadable(path)
    path = control_vector(tmp_path / "w.gguf", {"direction.1": np.ones(32, np.int32)})
    assert "direction.1 is I32, expected F32 or F16" in unreadable(path)
    path.write_bytes(b"GGUF" + b"\xff" * 40)
    assert "not a GGUF control vector" in unreadable(path)
    assert "does not exist" in unreadable(tmp_path / "none.gguf")


def unreadable(path):
    with pytest.raises(DirectionsError) as caught:
        read_directions(path)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    return sentence


def basis_file(path, metadata=None, **changes):
    tensors = load_file(write_random_directions(path, layers=3, hidden=8, rank=2))
    for name, values in changes.items():
        tensors[name.replace("_", ".layers.")] = values
    save_file(tensors, path, {"format": "ablate-shards.directions/1"} | (metadata or {}))
    return path


ROWS = np.eye(2, 8, dtype=np.float32)
ONE = LayerScore(1, 0.0, 1.0, 1.0)


def row(**changes):
    return json.dumps([dataclasses.asdict(ONE) | changes])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"direction_1": np.eye(1, 8, dtype=np.float32)}, "layer 1 has shape [1, 8], that of layer 0 [2, 8]"),
        ({"direction_2": np.eye(2, 9, dtype=np.float32)}, "layer 2 has shape [2, 9], that of layer 0 [2, 8]"),
        ({"direction_1": np.ones(8, np.float32)}, "layer 1 has shape [8], expected [k, d]"),
        ({"direction_0": np.ones((0, 8), np.float32)}, "layer 0 has shape [0, 8], expected [k, d]"),
        ({"direction_1": ROWS.astype(np.float16)}, "direction.layers.1 is F16, expected F32"),
        ({"direction_1": ROWS * 2}, "the rows of layer 1 are 3.0e+00 from orthonormal"),
        ({"direction_1": np.full((2, 8), 8**-0.5, np.float32)}, "the rows of layer 1 are"),
        ({"direction_1": ROWS * 0}, "the rows of layer 1 are 1.0e+00 from orthonormal"),
        ({"direction_1": ROWS * np.float32(np.nan)}, "the direction of layer 1 holds NaN or infinite values"),
        ({"reference_1": np.full(8, np.inf, np.float32)}, "the reference of layer 1 is not a finite vector of 8"),
        ({"reference_1": np.ones(9, np.float32)}, "the reference of layer 1 is not a finite vector of 8"),
        ({"extra": np.ones(9, np.float32)}, "holds extra, expected direction.layers.N and reference.layers.N only"),
    ],
)
def test_malformed_directions_are_refused(tmp_path, changes, said):
    assert said in unreadable(basis_file(tmp_path / "d.safetensors", **changes))


@pytest.mark.parametrize(
    "scores",
    [
        *("{", "3", '["a"]', '{"a": 1}', "[" * 100_000, row(more=1)),
        *(row(layer=layer) for layer in (9, None, "1", 1.0, True, [], {})),
        *(row(cosine=value) for value in ("1", None, True, [], 10**400, float("inf"))),
        *(row(contrast=None), row(purity=None), row(purity=float("-inf"))),
        *(row(auc=value) for value in (float("nan"), 10**400, "1", False, {})),
    ],
    ids=lambda text: text[:200],
)
def test_malformed_scores_are_refused(tmp_path, scores):
    path = basis_file(tmp_path / "d.safetensors", {"scores": row()})
    assert read_directions(path).scores == {1: ONE}
    assert read_directions(basis_file(path, {"scores": row(cosine=0, auc=None)})).scores == {1: ONE}
    assert "scores" in unreadable(basis_file(path, {"scores": scores}))


def test_other_files_are_no_directions(tmp_path):
    path = tmp_path / "x.safetensors"
    assert "does not exist" in unreadable(path)
    path.write_bytes(b"x" * 20)
    assert "not a valid safetensors file" in unreadable(path)
    save_file({"reference.layers.0": ROWS[0]}, path, {"format": "ablate-shards.directions/1"})
    assert "holds no directions" in unreadable(path)
    save_file({}, path, {"format": "ablate-shards.directions/2"})
    assert "its format is ablate-shards.directions/2 (holds no tensors), expected ablate-shards.directions/1" in (
        unreadable(path)
    )
    assert "its format is ablate-shards.activations/1 (holds negative.layers.0" in unreadable(write_dump(path))
    model = write_llama(tmp_path / "model") / "model-00001-of-00002.safetensors"
    assert "holds model.embed_tokens.weight [48, 32] of BF16" in unreadable(model)
    assert "not what is the direction of which layer" in unreadable(model)


def test_malformed_foreign_directions_are_refused(tmp_path):
    path = tmp_path / "d.npz"
    np.savez(path, **{"direction.layers.0": np.zeros((1, 8))})
    assert "the 1 rows of layer 0 span fewer dimensions" in unreadable(path)
    np.savez(path, **{"direction.layers.0": np.ones((2, 8))})
    assert "the 2 rows of layer 0 span fewer dimensions" in unreadable(path)
    np.savez(path, **{"direction.layers.0": np.full((1, 8), np.inf)})
    assert "NaN or infinite" in unreadable(path)
    np.savez(path, **{"direction.layers.0": np.ones((1, 2, 3))})
    assert "shape [1, 2, 3], expected [k, d]" in unreadable(path)
    np.savez(path, **{"other": np.ones((1, 8))})
    assert "holds other" in unreadable(path)
    np.savez(path, **{"direction.layers.0": np.ones((1, 8), int)})
    assert "direction.layers.0 is int64" in unreadable(path)
    path = tmp_path / "d.pt"
    torch.save({"refuse_0": torch.ones(4)}, path)
    assert "holds no directions of decoder layers" in unreadable(path)
    torch.save({"refuse_1": torch.ones(4, dtype=torch.int32)}, path)
    assert "refuse_1 is int32 [4], expected floating-point" in unreadable(path)
    torch.save({"refuse_1": torch.ones(4), "refuse_2": torch.ones(5)}, path)
    assert "layer 1 has shape [1, 5], that of layer 0 [1, 4]" in unreadable(path)
    torch.save({"refuse_1": torch.ones(4), "harmless_1": torch.ones(5)}, path)
    assert "the reference of layer 0 is not a finite vector of 4" in unreadable(path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 2}, "rank 2 needs the svd estimator; mean-difference gives one"),
        ({"rank": 2, "estimator": "geometric-median"}, "geometric-median gives one"),
        ({"rank": 0, "estimator": "svd"}, "rank: expected at least 1, found 0"),
        ({"winsorize": 0.5}, "winsorize: expected a quantile above 0.5, at most 1, found 0.5"),
        ({"winsorize": 1.01}, "found 1.01"),
        ({"winsorize": float("nan")}, "found nan"),
        ({"estimator": "median"}, "expected mean-difference, geometric-median, svd, found 'median'"),
    ],
)
def test_options_without_meaning_are_refused(options, said):
    with pytest.raises(UsageError) as caught:
        EstimatorOptions(**options)
    assert said in str(caught.value)


def uncomputable(path, options=MEAN):
    with pytest.raises(AblateError) as caught:
        compute(path, options)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("options", ESTIMATORS)
@pytest.mark.parametrize(("dtype", "bits"), [("F32", "nan"), ("F32", "inf"), ("BF16", "-inf"), ("F16", "nan")])
def test_values_that_are_not_finite_are_refused(tmp_path, monkeypatch, options, dtype, bits):
    monkeypatch.setattr(activations, "_CHUNK_BYTES", 1)
    positive, negative, _ = planted()
    negative[37, 5] = float(bits)
    tensors = {"positive.layers.4": positive, "negative.layers.4": negative}
    write_shard(tmp_path / "dump.safetensors", tensors, dtype, {"format": "ablate-shards.activations/1"})
    sentence = uncomputable(tmp_path / "dump.safetensors", options)
    assert f"negative.layers.4, prompt 37: holds {bits.strip('-')}, expected finite" in sentence


def test_infinities_that_cancel_are_refused(tmp_path):
    positive, negative, _ = planted()
    negative[20, 5], negative[40, 5] = np.inf, -np.inf
    assert "prompt 20: holds inf" in uncomputable(dump(tmp_path / "dump.safetensors", positive, negative))


def test_signalling_nan_is_refused_like_any_other(tmp_path):
    positive, negative, _ = planted()
    negative = negative.astype(np.float32)
    negative.view(np.uint32)[2, 3] = 0x7F800001
    assert "prompt 2: holds nan" in uncomputable(dump(tmp_path / "dump.safetensors", positive, negative))


def test_values_beyond_float32_are_refused(tmp_path):
    positive, negative, _ = planted()
    positive[8, 1] = 1e300
    path = dump(tmp_path / "dump.safetensors", positive, negative, dtype=np.float64)
    assert "positive.layers.0, prompt 8: holds 1e+300, expected finite values within the range of float32" in (
        uncomputable(path)
    )


def test_the_file_of_a_bad_prompt_is_named(tmp_path):
    positive, negative, _ = planted()
    dump(tmp_path / "a.safetensors", positive, negative)
    positive[9] = np.nan
    dump(tmp_path / "b.safetensors", positive, negative)
    assert f"{tmp_path}/b.safetensors: positive.layers.0, prompt 9: holds nan" in uncomputable(tmp_path)


@pytest.mark.parametrize("options", ESTIMATORS)
def test_equal_means_are_refused(tmp_path, options):
    positive, _, _ = planted()
    sentence = uncomputable(dump(tmp_path / "dump.safetensors", [positive] * 2, [positive] * 2), options)
    assert "layer 0: positive and negative activations have the same mean" in sentence
    nothing = np.zeros((3, HIDDEN))
    assert "the same mean" in uncomputable(dump(tmp_path / "dump.safetensors", nothing, nothing), options)


def test_svd_needs_pairs_and_rank(tmp_path):
    positive, negative, _ = planted()
    path = dump(tmp_path / "dump.safetensors", positive[:10], negative[:7])
    compute(path)
    assert "layer 0: svd needs pairs, found 10 positive and 7 negative prompts" in uncomputable(path, SVD)
    path = dump(tmp_path / "dump.safetensors", positive[:3], negative[:3])
    compute(path, EstimatorOptions("svd", 3))
    assert "rank 4 is more than 3 pairs of size 24 can give; lower --rank" in (
        uncomputable(path, EstimatorOptions("svd", 4))
    )
    for pairs in (10, 60):
        path = dump(
            tmp_path / "dump.safetensors",
            negative[:pairs] + normal(pairs, 1) * positive[0],
            negative[:pairs],
            dtype=np.float64,
        )
        assert "the paired differences span fewer than 2 dimensions; lower --rank" in (
            uncomputable(path, EstimatorOptions("svd", 2))
        )


@pytest.mark.parametrize("options", ESTIMATORS[1:])
def test_class_means_have_no_other_estimate(tmp_path, options):
    measurements(tmp_path / "m.pt")
    compute(tmp_path / "m.pt")
    with pytest.raises(ActivationsError, match="holds class means, of which only mean-difference can be taken"):
        compute(tmp_path / "m.pt", options)


def test_the_same_directions_are_the_same_bytes(tmp_path):
    found = compute_directions(open_activations(write_dump(tmp_path / "a.safetensors")), EstimatorOptions())
    found = dataclasses.replace(found, metadata={**found.metadata, "model": "m", "position": "last", "label": "x"})
    for number in range(6):
        write_directions(found, tmp_path / f"{number}.safetensors")
    assert len({(tmp_path / f"{number}.safetensors").read_bytes() for number in range(6)}) == 1
    assert read_directions(tmp_path / "0.safetensors").sha256() == found.sha256()


def test_a_measurement_file_gives_the_same_directions_either_way(tmp_path):
    rng = np.random.default_rng(0)
    content = {}
    for index in range(1, 4):
        for name in ("harmful", "harmless", "refuse"):
            content[f"{name}_{index}"] = torch.from_numpy(rng.standard_normal(16))
    torch.save(content, tmp_path / "m.refuse")
    computed = compute_directions(open_activations(tmp_path / "m.refuse"), EstimatorOptions())
    assert computed.sha256() == read_directions(tmp_path / "m.refuse").sha256()
    unit = content["refuse_1"].numpy() / np.linalg.norm(content["refuse_1"].numpy())
    assert abs(float(computed.basis[0][0] @ unit)) == pytest.approx(1, abs=1e-6)


def contrasts(folder, *, layers=6, pairs=24, size=40):
    """Writes three dumps of one model: a weak contrast, a strong one, and one that overlaps the strong one."""
    axes = orthonormal(normal(3, size, seed=11))
    kinds = {"framing": (axes[0], 1.5), "topic": (axes[1], 9.0), "answer": (0.6 * axes[1] + 0.8 * axes[2], 7.0)}
    for number, (name, (concept, gap)) in enumerate(kinds.items()):
        layer = [
            (normal(pairs, size, seed=100 * number + 2 * layer) + gap * concept, normal(pairs, size, seed=50 + layer))
            for layer in range(layers)
        ]
        dump(folder / f"{name}.safetensors", [positive for positive, _ in layer], [negative for _, negative in layer])
    return axes


def compared(folder, *names, **options):
    return compare_directions([open_activations(folder / f"{name}.safetensors") for name in names], MEAN, **options)


@pytest.mark.parametrize("names", [("framing", "topic"), ("topic", "framing")])
def test_the_kind_that_separates_better_is_taken(tmp_path, names):
    contrasts(tmp_path)
    found = compared(tmp_path, *names)
    assert found.taken.name == "topic"
    assert found.directions.sha256() == compute(tmp_path / "topic.safetensors").sha256()
    assert "the highest held-out AUC, 1.000" in found.reason
    metadata = found.directions.metadata
    assert metadata["dump"] == "topic"
    assert {row["dump"] for row in json.loads(metadata["compared"])} == set(names)
    write_directions(found.directions, tmp_path / "d.safetensors")
    assert read_directions(tmp_path / "d.safetensors").metadata == metadata


def test_kinds_agree_as_far_as_their_directions_do(tmp_path):
    contrasts(tmp_path)
    (tmp_path / "same.safetensors").write_bytes((tmp_path / "topic.safetensors").read_bytes())
    agreed = {
        (one.first, one.second): one for one in compared(tmp_path, "topic", "same", "framing", "answer").agreements
    }
    assert len(agreed) == 6
    assert agreed["topic", "same"].median == pytest.approx(1, abs=1e-6)
    assert agreed["topic", "same"].at_layer == pytest.approx(1, abs=1e-6)
    assert agreed["topic", "same"].layer == compute(tmp_path / "topic.safetensors").best_layer()
    assert abs(agreed["topic", "framing"].median) < 0.3
    assert agreed["topic", "answer"].median == pytest.approx(0.6, abs=0.1)


def test_opposite_labels_disagree_and_spans_are_compared_by_their_nearest_vectors(tmp_path):
    axes = contrasts(tmp_path)
    values, shift = normal(30, 40), normal(30, 40, seed=3) * 0.1
    for name, spread in (("one", axes[:2]), ("two", axes[1:])):
        positive = values + shift + (normal(30, 2, seed=4) * [2, 3] + [6, 6]) @ spread
        dump(tmp_path / f"{name}.safetensors", positive, values)
        dump(tmp_path / f"{name}-turned.safetensors", values, positive)
    assert compared(tmp_path, "one", "one-turned").agreements[0].median == pytest.approx(-1, abs=1e-6)
    options = EstimatorOptions("svd", 2)
    dumps = [open_activations(tmp_path / f"{name}.safetensors") for name in ("one", "two")]
    (agreement,) = compare_directions(dumps, options).agreements
    assert agreement.median > 0.98, "the planes share a line"


@pytest.mark.parametrize(
    ("scores", "taken", "why"),
    [
        ([(0.90, 0.9, 9.0), (0.92, 0.1, 1.0)], 1, "highest held-out AUC, 0.920"),
        ([(0.99, 0.9, 1.0), (1.0, 0.8, 9.0)], 0, "2 of the dumps have a held-out AUC within 0.01"),
        ([(1.0, 0.9, 2.0), (1.0, 0.9, 3.0)], 1, "highest signal-to-noise, 3.000"),
        ([(1.0, 0.9, 2.0), (1.0, 0.9, 2.0)], 0, "comes first"),
        ([(None, None, None), (0.6, 0.1, 0.1)], 1, "highest held-out AUC, 0.600"),
        ([(0.98, 0.9, 9.0), (0.995, 0.1, 1.0), (1.0, 0.2, 0.5)], 2, "the highest split-half cosine, 0.200"),
    ],
)
def test_the_rule_for_the_best(tmp_path, scores, taken, why):
    candidates = [
        Candidate(str(number), tmp_path, (None, None), scored(0.0), LayerScore(0, 0.5, 1.0, 1.0, signal, auc, split))
        for number, (auc, split, signal) in enumerate(scores)
    ]
    found, reason = compare._best(candidates)
    assert found.name == str(taken)
    assert why in reason


def test_dumps_that_cannot_be_compared_are_refused(tmp_path):
    contrasts(tmp_path)
    topic = tmp_path / "topic.safetensors"

    def refused(error, *paths):
        with pytest.raises(error) as caught:
            compare_directions([open_activations(path) for path in paths], MEAN)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    wide = dump(tmp_path / "wide.safetensors", [normal(4, 41)] * 6, [normal(4, 41, seed=1)] * 6)
    assert "do not come from one model: hidden size 41 and 40" in refused(ActivationsError, topic, wide)
    deep = dump(tmp_path / "deep.safetensors", [normal(4, 40)] * 7, [normal(4, 40, seed=1)] * 7)
    assert f"only {deep} has layer 6" in refused(ActivationsError, topic, deep)
    models = []
    for model in ("a", "b"):
        models.append(tmp_path / f"{model}.safetensors")
        metadata = {"format": "ablate-shards.activations/1", "model": model}
        save_file(load_file(topic), models[-1], metadata)
    assert "their metadata say 'b' and 'a'" in refused(ActivationsError, models[0], topic, models[1])
    assert "is given twice" in refused(UsageError, topic, tmp_path / "." / "topic.safetensors")
    for name in ("x", "y"):
        dump(tmp_path / f"{name}.safetensors", normal(1, 4) + 9, normal(1, 4, seed=1))
    said = refused(DirectionsError, tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    assert "nothing was held out of any" in said


@pytest.mark.parametrize("options", [*ESTIMATORS, EstimatorOptions("svd", 2)])
def test_other_directions_are_taken_out_exactly(tmp_path, options):
    positive, negative, concept = planted(pairs=40)
    other = unit(unit(normal(HIDDEN, seed=21)) + 0.5 * concept)
    path = dump(tmp_path / "dump.safetensors", [positive] * 2, [negative - 3 * other] * 2, dtype=np.float64)
    files = [tmp_path / "topic.npz", tmp_path / "style.npz"]
    np.savez(files[0], **{f"direction.layers.{layer}": other for layer in range(3)})
    # What two files share, and an axis that they nearly share, is taken out once.
    np.savez(files[1], **{f"direction.layers.{layer}": [other, other + 1e-3 * np.eye(HIDDEN)[0]] for layer in range(3)})
    opened = open_activations(path)
    before = compute(path, options)
    others = [read_directions(file) for file in files]
    axes = np.vstack([np.concatenate([other.basis[0] for other in others])]).astype(float)
    assert np.abs(before.basis[0] @ axes.T).max() > 0.1

    found = compute(path, options, without=read_without(files, opened))

    for layer in (0, 1):
        basis = found.basis[layer].astype(float)
        assert np.abs(basis @ axes.T).max() <= 1e-7
        np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-6)
        assert 0 < found.scores[layer].left < 0.99
    assert found.reference[0].tobytes() == before.reference[0].tobytes()
    assert json.loads(found.metadata["without"]) == [
        {"file": file.name, "sha256": other.sha256()} for file, other in zip(files, others, strict=True)
    ]
    write_directions(found, tmp_path / "d.safetensors")
    again = read_directions(tmp_path / "d.safetensors")
    assert again.scores == found.scores
    assert again.metadata == found.metadata


def test_the_scores_are_those_of_what_is_left(tmp_path):
    """They are the scores of a dump from whose activations the other direction was taken."""
    positive, negative, _ = planted(pairs=40, gap=0.4)
    other = unit(normal(HIDDEN, seed=21)).astype(np.float32).astype(float)
    positive += 8 * other
    path = dump(tmp_path / "dump.safetensors", positive, negative, dtype=np.float64)
    np.savez(tmp_path / "o.npz", **{"direction.layers.0": other})
    without = read_without([tmp_path / "o.npz"], open_activations(path))
    axis = without.axes[0][0]
    flat = [values - np.outer(values @ axis, axis) for values in (positive, negative)]
    wanted = compute(dump(tmp_path / "flat.safetensors", *flat, dtype=np.float64))
    found = compute(path, without=without)
    np.testing.assert_allclose(found.basis[0], wanted.basis[0], atol=1e-6)
    for name in ("signal_to_noise", "auc", "split_half"):
        assert getattr(found.scores[0], name) == pytest.approx(getattr(wanted.scores[0], name), rel=1e-6), name
    assert found.scores[0].auc < compute(path).scores[0].auc, "the topic alone separated"
    assert found.scores[0].left < 0.2


def test_class_means_are_cleaned_too(tmp_path):
    measurements(tmp_path / "m.pt")
    opened = open_activations(tmp_path / "m.pt")
    before = compute(tmp_path / "m.pt")
    other = normal(before.hidden_size, seed=4)
    np.savez(tmp_path / "o.npz", **{f"direction.layers.{layer}": other for layer in before.layers})
    found = compute(tmp_path / "m.pt", without=read_without([tmp_path / "o.npz"], opened))
    for layer in found.layers:
        assert abs(found.basis[layer][0] @ unit(other)) < 1e-7
        assert 0 < found.scores[layer].left < 1
        assert found.scores[layer].purity != before.scores[layer].purity
        assert found.scores[layer].contrast == before.scores[layer].contrast


def test_directions_that_cannot_be_taken_out_are_refused(tmp_path):
    positive, negative, _ = planted()
    path = dump(tmp_path / "dump.safetensors", [positive] * 2, [negative] * 2)
    write_directions(compute(path), tmp_path / "same.safetensors")
    files = {"short": {"direction.layers.0": np.ones(HIDDEN)}, "narrow": {"direction.layers.1": np.ones(5)}}
    for name, arrays in files.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)

    def refused(name):
        with pytest.raises(DirectionsError) as caught:
            compute(path, without=read_without([tmp_path / name], open_activations(path)))
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "holds no direction of layer 1" in refused("short.npz")
    assert "such as that of layer 1, have hidden size 5, but" in refused("narrow.npz")
    assert "layer 0: only" in refused("same.safetensors")


def test_directions_of_one_dump_are_the_same_bytes_as_ever(tmp_path):
    run("directions", write_dump(tmp_path / "a.safetensors"), tmp_path / "d.safetensors")
    arrays = load_file(tmp_path / "d.safetensors")
    with (tmp_path / "d.safetensors").open("rb") as file:
        metadata = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    assert set(metadata) == {"estimator", "format", "scores"}
    assert set(json.loads(metadata["scores"])[0]) == {
        *("layer", "cosine", "contrast", "purity", "signal_to_noise", "auc", "split_half")
    }
    assert len(arrays) == 6


def test_the_command_says_which_dump_was_taken_and_why(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    contrasts(tmp_path)
    dumps = [tmp_path / f"{name}.safetensors" for name in ("framing", "topic", "answer")]
    shown = run("directions", *dumps, tmp_path / "d.safetensors")
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["framing", "topic", "answer"]
    assert "is taken: " in shown.stdout
    assert "find different things" in shown.stdout
    taken = read_directions(tmp_path / "d.safetensors").metadata["dump"]
    assert lines[["framing", "topic", "answer"].index(taken) + 1].endswith("best")

    again = run("directions", *dumps, tmp_path / "d.safetensors", "--json", "--overwrite")
    content = json.loads(again.stdout)
    assert content["dump"] == taken
    assert len(content["dumps"]) == len(content["agreement"]) == 3
    assert all(len(row["layers"]) == 6 for row in content["dumps"])

    topic = tmp_path / "t.safetensors"
    assert run("directions", dumps[1], topic).exit_code == 0
    cleaned = run("directions", dumps[0], dumps[2], tmp_path / "d.safetensors", "--overwrite", "--without", topic)
    assert cleaned.exit_code == 0, cleaned.output
    assert "left: of each direction without those of --without; all scores are of what is left" in cleaned.stdout
    refused = run("directions", dumps[0], topic, "--overwrite", "--without", topic)
    assert refused.exit_code == 2
    assert "is read by --without" in refused.stderr


def test_an_ablation_takes_others_out_of_activations_alone(tmp_path):
    source = write_llama(tmp_path / "source")
    other = write_random_directions(tmp_path / "o.safetensors")
    path = write_dump(tmp_path / "a.safetensors")
    assert run("directions", path, tmp_path / "d.safetensors", "--without", other).exit_code == 0
    done = run(source, tmp_path / "one", "-a", path, "--without", other, "-q")
    assert done.exit_code == 0, done.output
    receipt = json.loads((tmp_path / "one" / "ablation.json").read_text())
    assert receipt["directions"]["sha256"] == read_directions(tmp_path / "d.safetensors").sha256()
    assert "o.safetensors" in receipt["directions"]["metadata"]["without"]
    refused = run(source, tmp_path / "two", "-d", tmp_path / "d.safetensors", "--without", other)
    assert refused.exit_code == 2
    assert "--without is about activations" in refused.stderr
    recipe = tmp_path / "edit.toml"
    recipe.write_text('[directions]\nactivations = "a.safetensors"\nwithout = "o.safetensors"\n')
    assert run(source, tmp_path / "three", "--recipe", recipe, "-q").exit_code == 0
    again = json.loads((tmp_path / "three" / "ablation.json").read_text())
    assert again["directions"]["sha256"] == receipt["directions"]["sha256"]
    # Directions that lie beside the weights are as finished as those that are named.
    write_random_directions(source / "directions.safetensors")
    beside = run(source, tmp_path / "four", "--without", other)
    assert beside.exit_code == 2
    assert "holds directions already; use -a DUMP" in beside.stderr
