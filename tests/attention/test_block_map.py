"""Where attention reads, tile by tile."""

from __future__ import annotations

import pytest
import torch

from service.attention import block_map
from service.attention.block_map import BlockMap, exact_map
from service.attention.geometry import LeafShape
from service.attention.masks import MaskSpec
from service.attention.pairs import tile_length
from service.attention.sparse import by_leaf, segment_plan
from service.attention.sparse.bounded_error import ErrorBound, attend_with_error_bound
from service.attention.synthetic import InputShape, diffuse, structured
from service.core.plan import PlanKind

from .helpers import clustered

CAUSAL = MaskSpec(is_causal=True)
MASKS = {
    "causal": CAUSAL,
    "full": MaskSpec(),
    "window": MaskSpec(is_causal=True, window=(400, -1)),
    "top left": MaskSpec(is_causal=True, causal_alignment="top_left"),
    "lengths": MaskSpec(kv_lengths=torch.tensor([300, 0])),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(by_leaf, "leaf_shape", lambda length: LeafShape(64, 8, 32))
    monkeypatch.setattr(block_map, "tile_length", lambda length, most: max(32, tile_length(length, most) // 4))


def visible(mask: MaskSpec, query: torch.Tensor, key: torch.Tensor, size: int) -> torch.Tensor:
    """[B, Hq, r, c] bool and counts, pair by pair."""
    lo, hi = block_map.row_bounds(mask, query.shape[0], query.shape[2], key.shape[2])
    at = torch.arange(key.shape[2])
    pairs = ((at >= lo[..., None]) & (at < hi[..., None])).float()
    rows, keys = (-(-length // size) * size for length in pairs.shape[1:])
    padded = torch.zeros(len(pairs), rows, keys)
    padded[:, : pairs.shape[1], : pairs.shape[2]] = pairs
    return padded.view(len(pairs), rows // size, size, keys // size, size).sum((2, 4))


@pytest.mark.parametrize("name", MASKS)
def test_exact_attention_reads_all_that_is_visible(name):
    query, key = torch.zeros(2, 3, 500, 4), torch.zeros(2, 1, 700, 4)
    found = exact_map(query, key, MASKS[name])
    expected = visible(MASKS[name], query, key, 32)
    assert torch.equal(found.visible, expected)
    octets = found.octets()
    assert octets.dtype == torch.uint8
    assert octets.shape == (2, 3, 16, 22)
    assert torch.equal(octets, torch.where(expected > 0, 255, 0).to(torch.uint8)[:, None].expand_as(octets))


def test_a_side_has_at_most_so_many_tiles_of_a_power_of_two():
    assert [tile_length(length) for length in (1, 128, 32768, 32769, 65537, 10**6)] == [128, 128, 128, 256, 512, 4096]
    assert tile_length(8192, 64) == 128
    assert tile_length(8193, 64) == 256


@pytest.mark.parametrize("name", ["causal", "full", "window"])
@pytest.mark.parametrize("by", ["leaves", "blocks"])
def test_what_is_read_adds_up_to_the_density(name, by, monkeypatch):
    mask = MASKS[name]
    if by == "leaves":
        monkeypatch.setattr(segment_plan, "BLOCKS_UP_TO", -1.0)
        query, key, value = clustered(2000, 2000, dim=16)
    else:
        monkeypatch.setattr(segment_plan, "tiles_of", lambda *_: [])
        query, key, value = structured(InputShape(1, 4, 2, 2000, 16), seed=0)
    bound = ErrorBound(0.5, PlanKind.DENSE, max_density=None, block_size=32, map_tiles=256)
    found = attend_with_error_bound(query, key, value, mask, bound)
    assert found.kind is PlanKind.SPARSE
    assert found.block_map is not None
    drawn = found.block_map
    share = float(drawn.read.sum() / (4 * drawn.visible.sum()))
    # scores of stand-ins and outliers are part of the density, and not drawn
    assert found.density - 0.16 < share <= found.density + 1e-6
    assert (drawn.read <= drawn.visible[:, None] + 1e-3).all()
    octets = drawn.octets()
    assert (octets[drawn.visible[:, None].expand_as(octets) == 0] == 0).all()
    diagonal = octets[0, :, range(octets.shape[2]), range(octets.shape[3])]
    assert (diagonal == 255).all() == (name != "full"), "rows read their neighbours exactly"
    assert 1 <= octets[octets > 0].min() < 255


def test_what_leaves_read_is_drawn_where_their_keys_are(monkeypatch):
    monkeypatch.setattr(segment_plan, "BLOCKS_UP_TO", -1.0)
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 2, 1024, 8), torch.randn(1, 1, 1024, 8), torch.randn(1, 1, 1024, 8)
    key[:, :, 100:108, 0], query[..., 0] = 12.0, 3.0  # eight keys that share half of each row's weight
    bound = ErrorBound(0.3, PlanKind.DENSE, max_density=None, map_tiles=256)
    found = attend_with_error_bound(query, key, value, CAUSAL, bound)
    octets = found.block_map.octets()[0, 0]
    assert (octets[8:, 3] > 1).all()
    others = octets[16:, [0, 1, 2, 4, 5, 6]]
    assert others.float().mean() < octets[16:, 3].float().mean() / 2


def test_heads_that_are_replaced_are_drawn_as_exact():
    query, key, value = structured(InputShape(1, 4, 4, 2000, 16), seed=0)
    for tensor, of_diffuse in zip((query, key, value), diffuse(InputShape(1, 1, 1, 2000, 16)), strict=True):
        tensor[:, 1:2] = of_diffuse
    bound = ErrorBound(0.05, PlanKind.DENSE, block_size=32, map_tiles=256)
    found = attend_with_error_bound(query, key, value, CAUSAL, bound)
    assert found.kind is PlanKind.SPARSE
    assert "head 1 exact" in found.reason
    octets = found.block_map.octets()[0]
    assert set(octets[1].unique().tolist()) == {0, 255}
    assert octets[0][octets[0] > 0].float().mean() < 128
    nothing = attend_with_error_bound(query, key, value, CAUSAL, ErrorBound(1e-9, PlanKind.DENSE, map_tiles=256))
    assert nothing.kind is PlanKind.DENSE
    assert set(nothing.block_map.octets().unique().tolist()) == {0, 255}
    assert attend_with_error_bound(query, key, value, CAUSAL, ErrorBound(0.05, PlanKind.DENSE)).block_map is None


def test_stretches_of_rows_spread_over_tiles():
    found = BlockMap.of(torch.zeros(1, 2, 100, 4), torch.zeros(1, 2, 64, 4), MaskSpec())
    found.add(torch.tensor([[[[48.0, 0.0], [4.0, 8.0]]]]), torch.tensor([0, 48, 52]), slice(0, 1))
    assert found.read[0, 0].tolist() == [[32.0, 0.0], [20.0, 8.0], [0.0, 0.0], [0.0, 0.0]]
    assert not found.read[0, 1].any()
