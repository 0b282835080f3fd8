"""Which runs benchmarks/pays.py makes next, and which of them its table shows."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import pays
import runs


def all_runs(loss, file):
    """What is run until nothing is left to do, with loss(phase, rate, seed) for training; read anew for each."""
    made = []
    while (found := pays.next_run("1M", "SAS", runs.read(file))) is not None:
        phase, rate, seed = found
        row = {"size": "1M", "kind": "SAS", "phase": phase, "rate": rate, "seed": seed}
        pays.append(file, {**row, "held_out_loss": loss(phase, rate, seed)})
        made.append(found)
        assert len(made) < 30
    return made


@pytest.mark.parametrize(
    ("best", "wider"),
    [(0.006, []), (0.012, [0.024]), (0.024, [0.024, 0.048]), (0.001, [0.0015, 0.00075]), (1, [0.024, 0.048])],
)
def test_the_search_goes_on_while_the_best_rate_is_at_its_end(tmp_path, best, wider):
    made = all_runs(lambda phase, rate, seed: abs(math.log(rate / best)), tmp_path / "pays.csv")
    searched = [run for run in made if run[0] == "search"]
    assert searched == [("search", rate, 0) for rate in (0.003, 0.006, 0.012, *wider)]
    nearest = min((rate for _, rate, _ in searched), key=lambda rate: abs(math.log(rate / best)))
    assert made[len(searched) :] == [("final", nearest, seed) for seed in (0, 1, 2)]


def test_where_a_seed_is_lost_the_next_best_rate_trains_all_seeds_and_is_shown(tmp_path):
    file = tmp_path / "pays.csv"
    losses = {0.012: 2.0, 0.006: 2.5, 0.003: 3.0, 0.024: math.nan}
    made = all_runs(lambda phase, rate, seed: math.nan if (rate, seed) == (0.012, 1) else losses[rate], file)
    assert [run[1:3] for run in made[4:]] == [(0.012, 0), (0.012, 1), (0.006, 0), (0.006, 1), (0.006, 2)]
    (group,) = runs.best(runs.read(file)).values()
    assert runs.losses(group) == [2.5, 2.5, 2.5]


def test_a_rate_whose_seeds_are_not_all_there_is_not_shown(tmp_path):
    file = tmp_path / "pays.csv"
    all_runs(lambda phase, rate, seed: abs(rate - 0.006), file)
    row = {"size": "1M", "kind": "SAS", "phase": "final", "rate": 0.012, "seed": 0, "held_out_loss": -1}
    pays.append(file, row)
    (group,) = runs.best(runs.read(file)).values()
    assert {row["rate"] for row in group} == {"0.006"}


def test_a_line_that_was_cut_short_is_not_read_and_goes_with_the_next(tmp_path):
    file = tmp_path / "pays.csv"
    made = all_runs(lambda phase, rate, seed: abs(rate - 0.006), file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    assert len(runs.read(file)) == len(made) - 1
    assert all_runs(lambda phase, rate, seed: abs(rate - 0.006), file) == made[-1:]
    assert file.read_bytes() == whole
