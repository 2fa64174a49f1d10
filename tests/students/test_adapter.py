import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as transforms

from students.adapter import FeatureAdapter


def identity(channels: int, grid: tuple[int, int]) -> FeatureAdapter:
    adapter = FeatureAdapter(channels, channels, grid)
    with torch.no_grad():
        adapter.projection.weight.copy_(torch.eye(channels)[:, :, None, None])
    return adapter


def test_projection_maps_channels_cell_by_cell() -> None:
    torch.manual_seed(0)
    adapter, features = FeatureAdapter(3, 5), torch.randn(2, 3, 30, 30)
    weight = adapter.projection.weight.detach().numpy()[:, :, 0, 0]
    expected = np.einsum("oc,bchw->bohw", weight, features.numpy())
    np.testing.assert_allclose(adapter(features).detach().numpy(), expected, atol=1e-5)


def test_unit_variance_in_is_unit_variance_out() -> None:
    torch.manual_seed(0)
    projected = FeatureAdapter(192, 384)(torch.randn(2, 192, 30, 30))
    assert projected.std().item() == pytest.approx(1, abs=0.05)


def test_a_coarser_grid_takes_the_mean_of_its_cells() -> None:
    features = torch.arange(900.0).reshape(1, 1, 30, 30)
    expected = features.numpy().reshape(1, 1, 15, 2, 15, 2).mean(axis=(3, 5))
    np.testing.assert_allclose(identity(1, (15, 15))(features).detach().numpy(), expected, rtol=1e-6)


def test_a_finer_grid_interpolates_between_cell_centres() -> None:
    features = torch.randn(1, 2, 30, 30, generator=torch.Generator().manual_seed(0))
    expected = transforms.resize(features, [34, 34], antialias=False)
    torch.testing.assert_close(identity(2, (34, 34))(features), expected)
