"""Each method takes its statistics from where it says, in training."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from model.network import FromContext, NetworkSpec, ResNet
from training.episodes import Episode
from training.methods import METHODS, NETWORKS, WAYS, make_method, training_loss


def network() -> ResNet:
    torch.manual_seed(0)
    return ResNet(NetworkSpec(channels=2, classes=3, width=4))


def episode(seed: int, controls: int = 3, treated: int = 4) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(controls + treated, 2, 64, 64, generator=generator)
    return Episode(images, torch.arange(treated) % 3, controls)


def test_the_loss_of_a_step_is_the_mean_over_plates_of_the_treated_rows_alone() -> None:
    net, episodes = network(), [episode(1), episode(2)]
    expected = []
    for one in episodes:
        logits, _ = net(one.images, FromContext(slice(0, 3)))
        expected.append(F.cross_entropy(logits[3:], one.labels))
    found = training_loss(net, make_method("cs-arm-bn", "controls"), episodes)
    torch.testing.assert_close(found, torch.stack(expected).mean())


@pytest.mark.parametrize(("name", "context"), [("cs-arm-bn", "controls"), ("cs-arm-bn", "union"), ("cs-arm-bn", "panel")])
def test_control_images_get_gradients(name: str, context: str) -> None:
    one = episode(1)
    one.images.requires_grad_()
    training_loss(network(), make_method(name, context), [one]).backward()
    assert one.images.grad is not None
    assert one.images.grad[:3].abs().max() > 0
    stopped = episode(1)
    stopped.images.requires_grad_()
    training_loss(network(), make_method(name, context, stop_gradient=True), [stopped]).backward()
    assert stopped.images.grad is not None
    assert stopped.images.grad[:3].abs().max() == 0


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_two_kinds_of_image_apart(name: str) -> None:
    net, method = network(), make_method(name)
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    controls = 4 if method.with_controls else 0
    losses = []
    for _ in range(20):
        labels = torch.arange(8) % 2
        images = torch.randn(controls + 8, 2, 128, 128, generator=generator)
        treated = images[controls:]
        treated[labels == 1] = F.avg_pool2d(treated[labels == 1] ** 3, 5, stride=1, padding=2)  # skewed, not only smooth
        treated[labels == 1, :, :, 64:] = 0
        loss = training_loss(net, method, [Episode(images, labels, controls)])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert np.median(losses[-7:]) < 0.5 * losses[0]


def test_a_panel_enters_the_statistics_and_not_the_loss() -> None:
    net, one = network(), replace(episode(1, controls=5), controls=3, panel=2)
    logits, _ = net(one.images, FromContext(slice(0, 5)))
    found = training_loss(net, make_method("cs-arm-bn", "panel"), [one])
    torch.testing.assert_close(found, F.cross_entropy(logits[5:], one.labels))


def test_every_way_has_a_name_of_its_own_and_a_network_that_is_trained() -> None:
    assert len({way.name for way in WAYS}) == len(WAYS)
    assert len({(way.method, way.context, way.blended) for way in WAYS}) == len(WAYS), "tables tell ways apart by these"
    assert {way.network for way in WAYS} == set(NETWORKS)


def test_every_network_can_be_made_from_what_a_run_says_of_it() -> None:
    for method in NETWORKS.values():
        context = method.context if method.with_controls else "controls"
        assert make_method(method.name, context, stop_gradient=method.stop_gradient) == method


def test_unknown_methods_and_contexts_are_refused() -> None:
    with pytest.raises(ValueError, match="no method 'magic'"):
        make_method("magic")
    with pytest.raises(ValueError, match="contexts controls, panel, union"):
        make_method("cs-arm-bn", "treated")
