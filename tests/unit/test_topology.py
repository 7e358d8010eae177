"""Who is where: integers only, checked on all small topologies."""

import pytest

from lightning_onebit.comm.topology import Topology

SHAPES = [(num_nodes, local_world_size) for num_nodes in range(1, 5) for local_world_size in range(1, 5)]
on_all_shapes = pytest.mark.parametrize(("num_nodes", "local_world_size"), SHAPES)


def ranks(num_nodes, local_world_size):
    """All ranks of a topology, in order."""
    return [
        Topology(num_nodes=num_nodes, node_rank=node, local_world_size=local_world_size, local_rank=local)
        for node in range(num_nodes)
        for local in range(local_world_size)
    ]


@on_all_shapes
def test_ranks_are_numbered_node_by_node(num_nodes, local_world_size):
    topologies = ranks(num_nodes, local_world_size)
    assert [t.rank for t in topologies] == list(range(num_nodes * local_world_size))
    assert {t.world_size for t in topologies} == {num_nodes * local_world_size}


@on_all_shapes
def test_nodes_and_peers_are_the_rows_and_columns_of_all_ranks(num_nodes, local_world_size):
    topologies = ranks(num_nodes, local_world_size)
    for t in topologies:
        assert t.node == [other.rank for other in topologies if other.node_rank == t.node_rank]
        assert t.peers == [other.rank for other in topologies if other.local_rank == t.local_rank]
        assert t.node[t.local_rank] == t.peers[t.node_rank] == t.rank
        assert set(t.node) & set(t.peers) == {t.rank}


@on_all_shapes
def test_every_chunk_has_one_server_in_the_order_in_which_messages_are_gathered(num_nodes, local_world_size):
    """First among peers, in the order of the nodes, then inside the node, in the order of local ranks."""
    topologies = ranks(num_nodes, local_world_size)
    assert sorted(t.chunk for t in topologies) == list(range(len(topologies)))
    for t in topologies:
        assert list(t.share) == [topologies[peer].chunk for peer in t.peers]
        assert [chunk for member in t.node for chunk in topologies[member].share] == list(range(t.world_size))


@pytest.mark.parametrize("num_nodes", range(1, 5))
def test_on_a_flat_network_every_rank_serves_its_own_number_and_compresses_all(num_nodes):
    for rank in range(num_nodes):
        t = Topology(num_nodes=num_nodes, node_rank=rank)
        assert t.is_flat
        assert (t.rank, t.chunk, t.node) == (rank, rank, [rank])
        assert t.peers == list(t.share) == list(range(num_nodes))
    assert not Topology(num_nodes=num_nodes, node_rank=0, local_world_size=2).is_flat
