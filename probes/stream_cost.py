"""What a layer and position takes whose states are streamed: passes over the store, memory and time, from shapes alone.

Arrays are counted where the code makes them, as `planning` does for states that are held. This module knows nothing
about labels' meaning or scores.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mmextract.engine.store import Store, open_store
from mmextract.probes import blocks, permutation
from mmextract.probes.kept_cost import count_deviations
from mmextract.probes.rounds import Round, list_rounds, list_tests

if TYPE_CHECKING:
    from mmextract.probes.run import ProbePlan

DOUBLE, SINGLE = 8, 4

PASSES = 40
"""Of a batch of training sets, until the last of its problems is solved: 17 to 69 where 1,000 to 16,000 samples × 100
features, alike or of very different widths, were fitted with and without a signal at five values of C."""

READ_SECONDS = 1e-8
"""Of one core, for each number of a layer's chunks: decoded, widened and looked at. Measured, as what follows, on
float32 of bfloat16's values in shards of 32 × 1024."""

MOMENT_FLOPS, PRODUCT_FLOPS = 3e10, 6e9
"""Double-precision operations a second of one core: of second moments, which take D² a sample as they are symmetric,
and of products with a few columns."""

EIGEN_SECONDS = 4.2e-10
"""Of one core, times D³: a training set's eigenvectors."""


def streamed_task_bytes(plan: ProbePlan) -> int:
    """Return what the arrays take of scoring one layer and position at their peak."""
    rounds = [*list_rounds(plan), *list_tests(plan)]
    asked = max(_job_bytes(plan, one) for one in rounds)
    solving = max(_solving_bytes(plan, one) for one in rounds)
    deciding = DOUBLE * max(min(_most_decided(), _decided(plan, one)) for one in rounds) * 2
    reading = _reading_bytes(plan)
    fitting = asked + max(solving, deciding) + reading
    return _kept_bytes(plan) + max(fitting, reading + _projecting_bytes(plan), _scoring_bytes(plan))


def count_passes(plan: ProbePlan) -> int:
    """Return roughly how many passes over its states one layer and position takes, and the other store's as many."""
    batches = sum(_count_batches(plan, one) for one in (*list_rounds(plan), *list_tests(plan)))
    return PASSES * batches + 4


def streamed_seconds(plan: ProbePlan) -> float:
    """Return roughly how long one core takes for one layer and position, permutations apart."""
    n, d = plan.design.n_samples, plan.hidden_size
    seconds = 0.0
    theirs = [] if plan.other is None else list_rounds(plan, plan.tasks[:1])  # of the other, the label alone
    for one in (*list_rounds(plan), *theirs):
        seconds += _count_batches(plan, one) * (PASSES * _pass_seconds(plan) + _moment_seconds(plan, one))
        seconds += PASSES * 2 * n * d * one.n_fits * one.n_outputs / PRODUCT_FLOPS
    return seconds


def streamed_permutation_seconds(plan: ProbePlan) -> float:
    """Return roughly how long one core takes for one shuffle of the label at one layer and position."""
    n, d = plan.design.n_samples, plan.hidden_size
    one = replace(list_rounds(plan)[0], n_sets=1, n_labels=1, n_penalties=len(plan.settings.test_penalties))
    columns = one.n_penalties * one.n_outputs
    together = max(1, permutation.MOST_ELEMENTS // (columns * (n + d)))
    together = max(1, min(together, _most_columns(plan) // columns))
    shared = PASSES * _pass_seconds(plan) + _moment_seconds(plan, one)
    own = PASSES * 2 * n * d * columns / PRODUCT_FLOPS
    return (1 if plan.other is None else 2) * plan.settings.folds * (shared / together + own)


def _moment_seconds(plan: ProbePlan, one: Round) -> float:
    """Return what the second moments of a batch of training sets take, and their eigenvectors."""
    d, n_sets = plan.hidden_size, _n_together(plan, one)
    _, n_added = _count_sums(plan, one)
    return n_added * d**2 / MOMENT_FLOPS + n_sets * EIGEN_SECONDS * d**3


def _count_sums(plan: ProbePlan, one: Round) -> tuple[int, int]:
    """Return how many matrices a batch's second moments are summed into at most, and the samples added to them in all.

    See `primal._find_moments`. Splits know nothing of each other, so that among the groups of several of them nearly
    all combinations of their parts occur, if there are as many groups. The samples are those of batches that hold
    whole splits.
    """
    n_sets, n_groups = _n_together(plan, one), plan.design.n_groups
    n_parts = one.n_folds + (one.n_outside > 0)
    whole = -(-n_sets // one.n_folds)
    torn = whole if n_sets == one.n_sets else (n_sets - 2) // one.n_folds + 2  # a batch begins within a split
    most = max(n_sets, min(4 * n_sets, n_parts**torn, max(2, n_groups)))
    shared = min(n_parts**whole, n_groups) <= 4 * n_sets
    return most, plan.design.n_samples if shared else n_sets * one.n_rows


def _pass_seconds(plan: ProbePlan) -> float:
    """Return what reading takes: of each sample, a layer's states at all positions are one chunk's part."""
    n_positions = open_store(plan.store).hidden_states.shape[2]
    return READ_SECONDS * plan.n_stored * n_positions * plan.hidden_size


def _most_columns(plan: ProbePlan) -> int:
    """Return the logits a sample that a training set may have in one batch; see `primal.PrimalSolver.solve_stored`."""
    from mmextract.probes.batches import LIVE_LOGITS

    return max(1, plan.streamed_elements // (LIVE_LOGITS * plan.design.n_samples))


def _columns(plan: ProbePlan, one: Round) -> int:
    """Return the logits a sample of a training set, all values of C in the same passes."""
    least = one.n_outputs
    return max(least, min(one.n_columns * one.n_penalties, _most_columns(plan) // least * least))


def _n_together(plan: ProbePlan, one: Round) -> int:
    """Return the training sets of a batch."""
    from mmextract.probes.batches import LIVE_LOGITS

    size = 2 * plan.hidden_size**2 + LIVE_LOGITS * plan.design.n_samples * _columns(plan, one)
    return max(1, min(one.n_sets, plan.streamed_elements // size))


def _count_batches(plan: ProbePlan, one: Round) -> int:
    parts = -(-one.n_columns * one.n_penalties // _columns(plan, one))
    return parts * -(-one.n_sets // _n_together(plan, one))


def shard_bytes(store: Store) -> int:
    """Return what shards take on their way, for one who reads them: chunks being decoded, and rows that wait."""
    states = store.hidden_states
    assert states.shards is not None
    d, shard = store.hidden_size, states.shards[0]
    n_shards = -(-states.shape[0] // shard)
    readers = min(blocks.count_readers(), n_shards)
    chunks = 3 * readers * states.dtype.itemsize * shard * states.shape[2] * d
    return chunks + SINGLE * min(2 * readers, n_shards) * shard * d


def block_elements(store: Store, n: int) -> int:
    """Return the elements of a block of n samples' states, at most."""
    d = store.hidden_size
    return min(n * d, blocks.BLOCK_ELEMENTS + store.shard_samples * d)


def _reading_bytes(plan: ProbePlan) -> int:
    """Return what shards take on their way, a block, and the one in use."""
    # of a block: its shards' rows and where they are not finite, its doubles, those in use and a training set's of them
    store = open_store(plan.store)
    block = block_elements(store, plan.design.n_samples)
    return shard_bytes(store) + block * (SINGLE + 1 + 3 * DOUBLE)


def _job_bytes(plan: ProbePlan, one: Round) -> int:
    """Return what jobs take, rows, their key and classes, and what solutions do, held until the last one is there."""
    rows = 3 * DOUBLE * one.n_sets * one.n_labels * one.n_rows
    return rows + DOUBLE * one.n_fits * one.n_outputs * (plan.hidden_size + 64)


def _solving_bytes(plan: ProbePlan, one: Round) -> int:
    from mmextract.probes.batches import LIVE_LOGITS
    from mmextract.probes.newton import LARGEST_HESSIAN

    n, d, columns, together = (
        plan.design.n_samples,
        plan.hidden_size,
        _columns(plan, one),
        _n_together(plan, one),
    )
    # sums of moments by kind of sample, then by training set, and one being made symmetric; those and their
    # eigenvectors, and LAPACK's workspace; and then the latter, with logits, weights, and a Hessian if one is needed
    parameters = (d + 1) * one.n_outputs
    hessian = 2 * parameters**2 + 4 * d * d if parameters <= LARGEST_HESSIAN else 0
    moments = (together + max(_count_sums(plan, one)[0], together) + 3) * d * d
    searching = together * (d * d + LIVE_LOGITS * n * columns + 6 * columns * d) + hessian
    # and who is in which training set, and these sorted
    return DOUBLE * max(moments, searching) + n * (2 * together + 6 * DOUBLE)


def _most_decided() -> int:
    from mmextract.probes.states import MOST_DECIDED

    return MOST_DECIDED


def _decided(plan: ProbePlan, one: Round) -> int:
    """Return the decisions of held-out samples that a round asks for, all in all."""
    n_held_out = min(plan.design.n_samples - one.n_rows, one.n_rows)
    return one.n_fits * one.n_outputs * n_held_out


def _n_classes(plan: ProbePlan) -> int:
    return len(plan.design.classes)


def _projecting_bytes(plan: ProbePlan) -> int:
    """Return what random directions take: projections of all splits or MOST_DECIDED, and a decision for each."""
    from mmextract.probes.evaluation import N_DIRECTIONS

    n, n_splits = plan.design.n_samples, len(plan.tasks[0].folds) * list_rounds(plan)[0].n_folds
    projected = min(n * N_DIRECTIONS * n_splits, _most_decided() + n * N_DIRECTIONS)
    members = 3 * n * n_splits
    return DOUBLE * (2 * projected + _random_decisions(plan)) + members


def _random_decisions(plan: ProbePlan) -> int:
    from mmextract.probes.evaluation import N_DIRECTIONS

    return N_DIRECTIONS * len(plan.tasks[0].folds) * plan.design.n_samples * _n_classes(plan)


def _kept_bytes(plan: ProbePlan) -> int:
    """Return what is kept to the end: each task's decisions, and how far each group moves each of its scores."""
    n, repeats = plan.design.n_samples, len(plan.tasks[0].folds)
    tasks = len(plan.tasks) + (plan.other is not None)
    return DOUBLE * tasks * (repeats * n * list_rounds(plan)[0].n_outputs + 8 * count_deviations(plan))


def _scoring_bytes(plan: ProbePlan) -> int:
    """Return what scores take, of random directions or of a batch of shuffles: decisions, and a dozen arrays like those
    of a repeat."""
    from mmextract.probes.evaluation import N_DIRECTIONS

    n = plan.design.n_samples
    random = 3 * _random_decisions(plan) // 2 + 10 * N_DIRECTIONS * n * _n_classes(plan)
    tests = list_tests(plan)
    shuffled = 0
    if tests:
        one = tests[0]
        shuffled = one.n_labels * n * (one.n_penalties * one.n_outputs + 10 * _n_classes(plan))
        shuffled += 18 * (1 + plan.settings.n_permutations) * plan.design.n_groups
    return DOUBLE * max(random, shuffled)
