"""Settings are validated on construction; counters add up."""

import dataclasses
import math

import pytest
import torch

from lightning_onebit.comm.stats import CommStats, PhaseCounters, ring_all_reduce_nbytes
from lightning_onebit.config import CompressionConfig
from lightning_onebit.phase import Phase
from lightning_onebit.quantize import make_kernels


@pytest.mark.parametrize(
    ("name", "value", "domain"),
    [
        ("block_size", 0, "multiple of 8 between 8 and 16384"),
        ("block_size", -8, "multiple of 8 between 8 and 16384"),
        ("block_size", 12, "multiple of 8 between 8 and 16384"),
        ("block_size", 2048.5, "multiple of 8 between 8 and 16384"),
        ("block_size", 16392, "multiple of 8 between 8 and 16384"),
        ("block_size", math.inf, "multiple of 8 between 8 and 16384"),
        ("block_size", math.nan, "multiple of 8 between 8 and 16384"),
        ("scale", "'l3'", "'l2'.*'l1'"),
        ("scale", "'L2'", "'l2'.*'l1'"),
        ("scale", "None", "'l2'.*'l1'"),
        ("space", "'gradient'", "'update'.*'momentum'"),
        ("bucket_cap_mb", 0, "> 0"),
        ("bucket_cap_mb", -1.5, "> 0"),
        ("bucket_cap_mb", math.nan, "> 0"),
        ("bucket_cap_mb", math.inf, "> 0"),
        ("warmup_precision", "'fp16'", "'fp32'.*'bf16'"),
        ("warmup_precision", "None", "'fp32'.*'bf16'"),
    ],
)
def test_invalid_setting_is_refused_with_value_and_domain(name, value, domain):
    setting = {"'l3'": "l3", "'L2'": "L2", "None": None, "'gradient'": "gradient", "'fp16'": "fp16"}.get(value, value)
    with pytest.raises(ValueError, match=rf"Invalid {name}: {value}\..*{domain}"):
        CompressionConfig(**{name: setting})


@pytest.mark.parametrize("block_size", [8, 16, 2048, 16384])
@pytest.mark.parametrize("scale", ["l2", "l1"])
@pytest.mark.parametrize("space", ["update", "momentum"])
def test_valid_settings_are_kept(block_size, scale, space):
    config = CompressionConfig(block_size=block_size, scale=scale, space=space)
    assert (config.block_size, config.scale, config.space) == (block_size, scale, space)


def test_defaults():
    config = CompressionConfig()
    assert (config.block_size, config.scale, config.space, config.bucket_cap_mb) == (2048, "l2", "update", None)


def test_an_accepted_block_size_works():
    """2048.0 equals 2048: it may be refused or taken, but not taken and then fail inside the kernels."""
    try:
        config = CompressionConfig(block_size=2048.0)
    except ValueError:
        return
    make_kernels(config, device=torch.device("cpu"), dtype=torch.float32)


def test_settings_are_keyword_only_and_frozen():
    with pytest.raises(TypeError):
        CompressionConfig(2048)
    with pytest.raises(dataclasses.FrozenInstanceError):
        CompressionConfig().block_size = 8


@pytest.mark.parametrize(("bucket_cap_mb", "numel"), [(25.0, 6_553_600), (1, 262_144), (0.5, 131_072), (1e-9, 2048)])
def test_bucket_cap_is_mebibytes_of_float32_but_at_least_a_block(bucket_cap_mb, numel):
    assert CompressionConfig(bucket_cap_mb=bucket_cap_mb).bucket_numel(10**9) == numel


@pytest.mark.parametrize(("model", "bucket"), [(1000, 1_048_576), (8_000_000, 2_000_000), (10**9, 16_777_216)])
def test_automatic_buckets_are_a_quarter_of_the_model_within_limits(model, bucket):
    assert CompressionConfig().bucket_numel(model) == bucket


@pytest.mark.parametrize(
    ("nbytes", "world_size", "sent"), [(400, 1, 0), (400, 2, 400), (400, 4, 600), (0, 4, 0), (10**12, 8, 1_750_000_000_000)]
)
def test_ring_all_reduce_sends_twice_the_data_but_for_the_own_part(nbytes, world_size, sent):
    assert ring_all_reduce_nbytes(nbytes, world_size) == sent
    assert isinstance(ring_all_reduce_nbytes(nbytes, world_size), int)


FIELDS = ["bytes_sent", "bytes_received", "dense_equivalent_bytes", "seconds_waited"]


@pytest.mark.parametrize("name", FIELDS)
def test_stats_sum_over_the_phases(name):
    stats = CommStats()
    setattr(stats[Phase.WARMUP], name, 5)
    setattr(stats[Phase.COMPRESSED], name, 7)
    assert {field: getattr(stats, field) for field in FIELDS} == dict.fromkeys(FIELDS, 0) | {name: 12}


def test_stats_start_at_zero_in_both_phases():
    stats = CommStats()
    assert [stats[phase] for phase in Phase] == [PhaseCounters(), PhaseCounters()]
    assert [getattr(stats, name) for name in FIELDS] == [0, 0, 0, 0]


def test_two_stats_do_not_share_counters():
    first, second = CommStats(), CommStats()
    first[Phase.WARMUP].bytes_sent += 1
    assert second.bytes_sent == 0


def test_compression_ratio_counts_the_compressed_phase_only():
    stats = CommStats()
    stats[Phase.WARMUP].bytes_sent = stats[Phase.WARMUP].dense_equivalent_bytes = 10**9
    assert math.isnan(stats.compression_ratio)
    stats[Phase.COMPRESSED].bytes_sent = 100
    stats[Phase.COMPRESSED].dense_equivalent_bytes = 3150
    assert stats.compression_ratio == 31.5
