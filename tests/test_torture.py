"""A dozen kills of the hundred that `make torture` does, at points that a seed draws: the same command again, until it
has finished, gives the weights and the losses of a run that was left alone, bit for bit."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]/"benchmarks"))
import torture
from torture import Crash, Trial, longest_copy, make_job, measure_reference, rows_of, trial, work_lost

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "What a trial's process calls: 12 steps, an evaluation every 4, and a checkpoint about every 60 ms."
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(torture.SHAPE, "n_layer", 1)
        patch.setitem(torture.SHAPE, "n_embd", 32)
        job = make_job(tmp_path_factory.mktemp("job"), 200)
    brief = "--num-train-epochs", "1", "--eval-steps", "4"
    return torture.ours, str(job), "--save-minutes", "0.001", "--mirror", "mirror", *brief


@pytest.fixture(scope="module")
def reference(run): return measure_reference(run)


def share(part, folder="out", later=0):
    "A crash point at this share of the changes in a folder."
    return lambda reference: Crash(event=max(1, round(part * reference["counts"][folder])), folder=folder, later=later)


def moment(part): return lambda reference: Crash(moment=part * reference["seconds"])


KILLS = {
    "before the first step": [moment(0.2)],
    "in the training": [moment(0.5)],
    "at the end": [moment(0.9)],
    "where the first checkpoint is made": [share(0.1)],
    "inside saving": [share(0.3, later=0.004)],
    "between two renames": [share(0.6)],
    "inside saving the model": [share(0.97, later=0.002)],
    "inside mirroring": [share(0.4, "mirror", later=0.003)],
    "where the mirror's manifest is made": [share(0.75, "mirror")],
    "twice in a row, the second time inside saving": [share(0.5), share(0.2, later=0.003)]}


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_run_started_again_is_the_run_that_was_left_alone(run, reference, kill):
    made = trial(torture.OURS, kill, run, [crash(reference) for crash in KILLS[kill]], reference)
    assert (made.outcome, made.why) == ("equal", ""), made
    assert made.kills >= 1


@pytest.mark.parametrize("kill", [share(0.7), share(0.6, "mirror", later=0.003)], ids=["saving", "mirroring"])
def test_a_new_machine_with_the_mirror_goes_on_where_the_old_one_was(run, reference, kill):
    "The output folder and the caches are gone."
    made = trial(torture.OURS, torture.MACHINE, run, [kill(reference)], reference)
    assert (made.outcome, made.why) == ("equal", ""), made
    assert made.kills == 1 and made.lost[0]["steps"] < reference["steps"] and made.lost[0]["copy"] > 0


# The harness

def test_work_is_lost_from_the_last_step_that_was_kept():
    steps = [(n, float(n)) for n in range(1, 11)]
    assert work_lost(steps, [(8, 20.)]) == dict(steps=3, seconds=3., longest=1.)
    assert work_lost(steps, []) == dict(steps=0, seconds=0., longest=1.)  # the model was saved
    assert work_lost(steps, [(1, 20.)])["steps"] == 10
    assert work_lost([], [(1, 20.)])["steps"] == 0  # killed before its first step
    resumed = [(n, float(n)) for n in range(6, 11)]
    assert work_lost(resumed, [(6, 20.)])["steps"] == 5


def test_what_a_new_machine_has_lost_is_compared_with_a_save_interval_and_a_copy(tmp_path):
    (log := tmp_path/"log").write_text("step 1 10\ncopy 11\nstep 2 12\ncopied 13\nstep 3 19\ncopy 20\nstep 4 23.5\n")
    assert longest_copy(log) == 3.5 and longest_copy(tmp_path/"none") == 0  # it was on its way
    def made(kind, seconds):
        lost = [dict(steps=1, seconds=seconds, longest=1., copy=2.)]
        return Trial(torture.OURS, kind, kills=1, starts=2, outcome="equal", lost=lost)
    here, new = rows_of([made(torture.EVENT, 2.), made(torture.MACHINE, 5.)], interval=3.)[2:]
    assert (here.ratio.median, here.reached) == (0.5, True) and (new.peer.median, new.ratio.median) == (6, 5/6)
    assert here.figure != new.figure and new.target == 1 and new.reached


def test_a_run_that_is_not_what_it_was_is_found_out(run, reference):
    "The harness itself: another seed gives other weights, and a command that refuses is no equal run."
    other = trial(torture.OURS, "other", (*run, "--seed", "1"), [Crash(moment=0.5)], reference)
    assert (other.outcome, other.why) == ("unequal", "weights, losses")
    refused = trial(torture.OURS, "refused", (*run, "--seed", "-1"), [Crash()], reference)
    assert refused.outcome == "refused" and "--seed" in refused.why
