"""doctor's cost model: its limits, an example by hand, and where its advice changes."""

import itertools
from dataclasses import replace

import pytest

from lightning_onebit.doctor.advice import recommended, turning_point
from lightning_onebit.doctor.cost_model import (
    MEBIBYTE,
    DeviceSpeeds,
    Job,
    Network,
    compute_seconds,
    ddp_buckets,
    dense_step,
    exchange_seconds,
    onebit_step,
    predict,
    processor_factor,
    refreshes,
)
from lightning_onebit.doctor.links import Links, network_of, speeds_of_memory
from lightning_onebit.doctor.probe import Curve
from lightning_onebit.doctor.published import SETTINGS
from lightning_onebit.doctor.simulate import simulated
from lightning_onebit.refresh_schedule import is_refresh_due

FREE = DeviceSpeeds(**{name: 0.0 for name in DeviceSpeeds.__dataclass_fields__})
UNIT = DeviceSpeeds(**{name: 1e-9 for name in DeviceSpeeds.__dataclass_fields__})
JOB = Job(numels=(1e6,) * 20, forward_seconds=0.1, backward_seconds=0.2, factor_numel=4e4)
TEXT = "nodes=16,gpus=4,bandwidth=10gbit,latency=50us,params=340M,backward=0.3"


def network(bandwidth=1e9, *, nodes=4, devices=1, **options):
    return network_of(Links(nodes=nodes, devices=devices, bandwidth=bandwidth, **options))


def seconds(job, speeds, links, **options):
    return {each.name: each.step_seconds for each in predict(job, speeds, links, overlaps=False, **options)}


def test_one_rank_sends_nothing_and_takes_what_computing_takes():
    alone = predict(JOB, UNIT, network(nodes=1), overlaps=False)
    assert [each.sent_bytes for each in alone] == [0.0] * 4
    assert {each.step_seconds for each in alone} == {compute_seconds(JOB, UNIT)}


@pytest.mark.parametrize("devices", [1, 4])
def test_an_infinite_bandwidth_without_latency_leaves_computing(devices):
    links = network(1e30, devices=devices, latency=0.0, node_bandwidth=1e30, node_latency=0.0, message=0.0)
    for step in seconds(JOB, FREE, links).values():
        assert step == pytest.approx(0.3)


@pytest.mark.parametrize(("nodes", "devices"), [(2, 1), (4, 4), (1024, 8)])
def test_more_bandwidth_never_takes_longer(nodes, devices):
    rates = [1e7 * 3**k for k in range(12)]
    steps = [seconds(JOB, UNIT, network(rate, nodes=nodes, devices=devices)) for rate in rates]
    for slower, faster in itertools.pairwise(steps):
        assert all(faster[name] <= slower[name] for name in slower)
        assert sum(faster.values()) < sum(slower.values())


def test_the_dense_step_by_hand():
    """Two ranks, 1 Gbit/s, no latency, 1.5 buckets: the first tensor of 1 MiB hides, the rest waits for backward's end."""
    mebi = MEBIBYTE / 4
    job = Job(numels=(10 * mebi, mebi), forward_seconds=0.01, backward_seconds=0.11)
    assert ddp_buckets(job.numels) == [(mebi, pytest.approx(1 / 11)), (10 * mebi, 1.0)]
    # The ring sends 2 (n - 1) / n = 1 times the bytes: 1 MiB after 0.02 s, for 8.4 ms, and 10 MiB after 0.12 s, for 84 ms.
    links = network(1e9, nodes=2, latency=0.0, message=0.0)
    assert dense_step(job, FREE, links) == pytest.approx(0.12 + 10 * MEBIBYTE * 8 / 1e9)
    # Where half of an exchange is work for cores that compute, half of what hides counts.
    assert dense_step(job, FREE, replace(links, processor_share=0.5)) == pytest.approx(
        0.12 + 10 * MEBIBYTE * 8 / 1e9 + 0.5 * MEBIBYTE * 8 / 1e9
    )
    assert dense_step(job, FREE, links, element_bytes=2.0) == pytest.approx(0.12 + 5 * MEBIBYTE * 8 / 1e9)


def test_the_compressed_step_by_hand():
    """One bucket of 2^20 elements on two ranks: encode, 1.016 bits there, serve, as many back, apply."""
    numel = float(2**20)
    job = Job(numels=(numel,), forward_seconds=0.01, backward_seconds=0.02)
    links = network(1e6, nodes=2, latency=0.0, message=0.0)
    one_way = 0.5 * numel * (1 + 32 / 2048) / 1e6
    assert exchange_seconds(links, numel * (1 + 32 / 2048) / 8) == pytest.approx(2 * one_way)
    agree = 4 * 8 / 1e6
    speeds = replace(FREE, encode=1e-9, serve=2e-9, apply=3e-9)
    assert onebit_step(job, speeds, links) == pytest.approx(0.03 + agree + 2 * one_way + 6e-9 * numel)


def test_exchanges_during_backward_hide_behind_it():
    links = network(200e6)
    assert onebit_step(JOB, UNIT, links, overlaps=True) < onebit_step(JOB, UNIT, links)


def test_shared_cores_multiply_what_the_processor_does():
    assert processor_factor(4, 2) == 2
    assert processor_factor(2, 4) == processor_factor(8, None) == 1
    links = network(1e30, latency=0.0, message=0.0)
    alone, shared = seconds(JOB, UNIT, links), seconds(JOB, UNIT, links, cores=2)
    assert all(shared[name] == pytest.approx(2 * alone[name]) for name in alone)


def test_a_run_that_is_all_warm_up_takes_as_long_as_ddp():
    short = {each.name: each for each in predict(replace(JOB, steps=20), UNIT, network(), overlaps=False)}
    assert short["onebit"].speedup == pytest.approx(1.0)
    long = {each.name: each for each in predict(JOB, UNIT, network(), overlaps=False)}
    assert short["onebit"].mean_step_seconds > long["onebit"].mean_step_seconds > long["onebit"].step_seconds


def test_refreshes_are_counted_as_the_schedule_has_them():
    for last in (1000, 2100, 2148):
        assert refreshes(20, last) == sum(is_refresh_due(step, "auto") for step in range(21, last + 1))


def test_nodes_that_average_first_send_less_between_nodes():
    by_name = {each.name: each for each in predict(JOB, UNIT, network(devices=8), overlaps=True)}
    assert by_name["onebit_hierarchical"].sent_bytes < by_name["onebit"].sent_bytes / 8
    slow = {each.name: each for each in predict(JOB, UNIT, network(100e6, devices=8), overlaps=True)}
    assert recommended(list(slow.values())).name == "onebit_hierarchical"


def test_advice_changes_at_the_bandwidth_that_it_names():
    setting = simulated(TEXT)
    assert recommended(setting.predictions).name.startswith("onebit")
    rate, other = turning_point(setting.network, setting.predict_at, faster=True)
    for factor, expected in ((0.99, "onebit"), (1.01, other.name)):
        moved = setting.network.with_bandwidth(factor * rate / setting.network.bits_per_second)
        assert recommended(setting.predict_at(moved)).name.startswith(expected)
    assert turning_point(setting.network, setting.predict_at, faster=False) is None


def test_a_little_to_send_is_left_to_ddp():
    assert recommended(simulated(TEXT.replace("340M", "4M").replace("0.3", "1")).predictions).name == "ddp"


def test_curves_go_through_what_was_measured_and_on():
    curve = Curve(((100.0, 1.0), (200.0, 3.0), (400.0, 4.0)))
    assert [curve(x) for x in (0, 100, 150, 200, 300, 400, 800)] == [1, 1, 2, 3, 3.5, 4, 6]


@pytest.mark.parametrize("each", SETTINGS, ids=lambda each: each.name)
def test_published_settings_come_out_within_a_factor_of_two(each):
    assert all(0.5 < speedup / each.reported < 2 for speedup in each.modelled(each.setting()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodes=16", "Missing in --simulate: bandwidth"),
        (
            TEXT.replace("nodes=16", "nodes=2000"),
            "Invalid nodes in --simulate: '2000'. Must be a whole number from 1 to 1024",
        ),
        (TEXT.replace("10gbit", "10"), "Invalid bandwidth in --simulate: '10'. Must be a rate > 0 with its unit"),
        (TEXT.replace("0.3", "-1"), "Invalid backward in --simulate: '-1'"),
        (TEXT.replace("gpus", "tpus"), "Invalid in --simulate: 'tpus=4'. Names are nodes, gpus,"),
        (TEXT + ",nodes=2", "Twice in --simulate: nodes"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        simulated(text)


def test_the_largest_setting_is_quick_and_finite():
    setting = simulated(TEXT.replace("nodes=16,gpus=4", "nodes=1024,gpus=8"))
    assert isinstance(setting.network, Network)
    assert all(0 < each.mean_step_seconds < 60 for each in setting.predictions)
    assert speeds_of_memory(1e12, 8192).serve < speeds_of_memory(1e12, 2).serve
