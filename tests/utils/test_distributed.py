"""Processes of a job: gradients are summed once, whatever wraps the network; a restart forgets the start before."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from retinanet.utils import distributed


@pytest.fixture
def job():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_not_sent_while_their_sum_is_off(job, compiled):
    net, sent = distributed.data_parallel(nn.Linear(3, 2), torch.device("cpu")), []

    def count(_state, bucket):
        sent.append(bucket)
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    net.register_comm_hook(None, count)
    net = torch.compile(net, backend="eager") if compiled else net
    for active, expected in ((True, 0), (True, 0), (False, 1), (True, 1), (False, 2)):
        with distributed.no_gradient_sync(net, active):
            net(torch.ones(1, 3)).sum().backward()
        assert len(sent) == expected


def test_values_are_gathered_in_the_first_process(job):
    assert distributed.gather_to_main({"a": torch.ones(2)})[0]["a"].tolist() == [1, 1]


def test_a_restarted_job_does_not_see_the_addresses_of_the_one_before(monkeypatch):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "RANK": "1", "WORLD_SIZE": "2"}
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "0"}
    for name, value in {**job, **agent}.items():
        monkeypatch.setenv(name, value)
    first, peer = (distributed._store_of_this_start()["store"] for _ in range(2))
    first.set("address", "127.0.0.1:8074")
    assert peer.get("address") == b"127.0.0.1:8074"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = distributed._store_of_this_start()
    assert not again["store"].check(["address"])
    assert (again["rank"], again["world_size"]) == (1, 2)
