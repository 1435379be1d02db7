"""Two processes with half the batch each are one process with the whole."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp

from .distributed_worker import GAMES, Step, batch, train, work


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ddp"))
    mp.spawn(work, args=(folder,), nprocs=2)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("game", GAMES)
def test_processes_agree(results, game):
    first, second = (r[game] for r in results)
    for key, value in first.items():
        # Each rank keeps count, logs and statistics of its own batch between the broadcasts.
        if key.startswith("student") or "adapter" in key or "original" in key or "bias" in key:
            assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("game", [g for g in GAMES if not GAMES[g]["normalize"]])
def test_the_same_numbers_as_from_one_process(results, game):
    step = Step(game)
    train(step, *batch())
    trained = dict(step.named_parameters())
    for key, value in trained.items():
        torch.testing.assert_close(results[0][game][key], value.detach())
    # All weights have moved. (A bias that shifts the scores of both sides alike need not.)
    moved = {k for k, p in Step(game).named_parameters() if not torch.equal(p, trained[k])}
    assert {k for k in trained if "bias" not in k} <= moved


def test_standardised_by_the_statistics_of_each_rank_it_trains(results):
    state = results[0]["point, standardised"]
    assert state["fad.teacher_units.batches"] == 3
    assert all(v.isfinite().all() for v in state.values() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("game", [game for game in GAMES if "balanced" in game])
def test_all_ranks_use_one_balance(results, game):
    first, second = (r[game] for r in results)
    # The last step's is counted at the next one.
    assert first["fad.balance.measured"] == second["fad.balance.measured"] == 2
    assert first["weight"] == second["weight"] != 1
    assert first["fad.balance.task"] == second["fad.balance.task"] > 0
