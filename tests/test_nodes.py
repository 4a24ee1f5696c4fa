"""Two torchrun agents on one machine are two nodes: the same training, and what they must share."""

import pytest
import torch
from ranks import forked, forked_nodes
from test_train import arguments, metrics, small_data, tensors, texts

SETTINGS = dict(steps=3, kl_coef=0.01, keep_checkpoints=9)


@pytest.fixture(scope="module")
def one_node(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_node")
    data = small_data(start, folder, 10)
    run = forked(2, *arguments(start, folder / "run", train_data=data, **SETTINGS))
    return folder / "run", data, run.stdout


def test_sharded_over_both_nodes_it_is_the_same_run_bit_for_bit(one_node, start, tmp_path):
    whole, data, _ = one_node
    command = arguments(start, tmp_path / "run", train_data=data, shard_ranks=2, **SETTINGS)
    forked_nodes(command, command)
    assert metrics(tmp_path / "run") == metrics(whole)
    ours, theirs = tensors(tmp_path / "run", 3), tensors(whole, 3)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_by_default_each_node_holds_the_model(one_node, start, tmp_path):
    """Replicas, whose gradients are averaged; what they save is one model."""
    whole, data, both = one_node
    command = arguments(start, tmp_path / "run", train_data=data, **SETTINGS)
    said = forked_nodes(command, command)[0][1]
    assert float(said.partition("GB per rank: ")[2].split()[0]) == pytest.approx(
        2 * float(both.partition("GB per rank: ")[2].split()[0]), rel=0.05)
    assert texts(tmp_path / "run", "step_000003") == texts(whole, "step_000003")
    for step in (1, 2, 3):
        ours, theirs = metrics(tmp_path / "run")[step], metrics(whole)[step]
        for name in ("reward/overall", "loss/policy", "loss/kl", "grad_norm", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), name
    ours = tensors(tmp_path / "run", 3)  # saved once, not by each replica
    assert sum(x.numel() for x in ours.values()) == sum(
        x.numel() for x in tensors(whole, 3).values())


def test_a_disk_of_its_own_is_refused(start, tmp_path):
    ours, theirs = (arguments(start, tmp_path / name, steps=1) for name in ("a", "b"))
    done = forked_nodes(ours, theirs, check=False)
    assert all(code for code, _ in done)
    assert f"out_dir={tmp_path}/b must be on a disk that all nodes share" in done[1][1]
    assert not (tmp_path / "a/metrics.jsonl").read_text()
