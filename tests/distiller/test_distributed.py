"""A distiller under DDP and FSDP2: two processes with half the batch are one with the whole."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp

from .distributed_worker import NETWORKS, WAYS, build, train, work
from .networks import clouds


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("distributed"))
    mp.spawn(work, args=(folder,), nprocs=2)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_same_numbers_as_from_one_process(results, network, way):
    distiller = build(network)
    train(distiller, clouds())
    wanted = {key: parameter.detach() for key, parameter in distiller.named_parameters()}
    before = dict(build(network).named_parameters())
    assert not any(torch.equal(before[k], wanted[k]) for k in wanted if k.endswith("weight"))
    for result in results:
        got = {key: value.detach() for key, value in result[network, way].items()}
        torch.testing.assert_close(got, wanted)


def test_compiled_processes_agree_on_the_share(results):
    states = [result["share", way] for result in results for way in ("eager", "compiled")]
    # What the last backward has shown is not yet counted, and each rank's own.
    states = [{k: v for k, v in state.items() if "pending" not in k} for state in states]
    assert int(states[0]["losses.conv5:conv5.balance.measured"]) == 2
    for state in states[1:]:
        torch.testing.assert_close(state, states[0])
