"""The rate predictor: shape, saving, loading, refusals."""

from __future__ import annotations

import pytest
import torch

from dyrate_lib import DyRate, InputError, RatePredictor, ResourceError


def test_untrained_predictor_keeps_all():
    predictor = RatePredictor(4, 10)
    shares = torch.softmax(torch.randn(3, 4, 4), -1)
    assert torch.allclose(torch.softmax(predictor(shares), -1), torch.full((3, 10), 0.1))
    assert predictor(shares).argmax(-1).tolist() == [0, 0, 0]
    assert predictor.flops() == 2 * 16 * 10 + 10


def test_round_trip(tmp_path):
    predictor = RatePredictor(6, 20, layer=2)
    predictor.linear.weight.data.normal_()
    path = predictor.save(tmp_path / "deep" / "p.safetensors", model="scenes-small", target=0.333, seed=1)
    loaded = RatePredictor.load(path)
    assert (loaded.n_heads, loaded.n_rates, loaded.layer) == (6, 20, 2)
    assert loaded.metadata == {"model": "scenes-small", "target": 0.333, "seed": 1}
    shares = torch.rand(2, 5, 6, 4)
    assert torch.equal(loaded(shares), predictor(shares))
    assert DyRate(path).layer == 2
    assert [p.name for p in path.parent.iterdir()] == ["p.safetensors"]


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="heads"):
        RatePredictor(4)(torch.rand(2, 8, 4))
    with pytest.raises(InputError, match="at least 1"):
        RatePredictor(0)
    with pytest.raises(ResourceError, match="No predictor"):
        RatePredictor.load(tmp_path / "absent.safetensors")
    good = RatePredictor(4).save(tmp_path / "p.safetensors")
    content = good.read_bytes()
    for bad in (b"", content[: len(content) // 2], b"not a predictor" * 10):
        good.write_bytes(bad)
        with pytest.raises(InputError, match="damaged"):
            RatePredictor.load(good)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, good)
    with pytest.raises(InputError, match="not a rate predictor"):
        RatePredictor.load(good)
    with pytest.raises(InputError, match="predictor must be"):
        DyRate(predictor=3)
    with pytest.raises(InputError, match="rank"):
        DyRate(RatePredictor(4), rank="never")


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    predictor = RatePredictor(4)
    path = predictor.save(tmp_path / "p.safetensors")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ResourceError, match="Free some room"):
        predictor.save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]
