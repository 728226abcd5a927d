"""Mathematics of the BN layers against references: torch's own BN, float64 finite differences, published sizes."""

import pytest
import torch

from model.network import EPS, Ensemble, FromContext, Given, NetworkSpec, PerInstance, ResNet, Running


def small(depth: int = 18, *, antialiased: bool = True, seed: int = 0) -> ResNet:
    torch.manual_seed(seed)
    return ResNet(NetworkSpec(channels=3, classes=4, depth=depth, width=4, antialiased=antialiased))


@pytest.mark.parametrize("antialiased", [False, True])
def test_a_resnet50_has_the_sizes_that_the_paper_gives(antialiased: bool) -> None:
    network = ResNet(NetworkSpec(channels=5, classes=8, depth=50, width=64, antialiased=antialiased))
    assert network.features == 26_560
    assert sum(parameter.numel() for parameter in network.parameters()) == 23_530_696
    assert network.embedding_dim == 2048


@pytest.mark.parametrize("depth", [18, 34, 50])
@pytest.mark.parametrize("antialiased", [False, True])
def test_every_network_takes_any_size_and_number_of_channels(depth: int, antialiased: bool) -> None:
    network = ResNet(NetworkSpec(channels=2, classes=3, depth=depth, width=4, antialiased=antialiased))
    for size in (64, 96):
        logits, embedding = network(torch.randn(2, 2, size, size), FromContext())
        assert logits.shape == (2, 3)
        assert embedding.shape == (2, network.embedding_dim)


@torch.no_grad()
def test_statistics_measured_on_a_context_and_given_back_answer_the_same() -> None:
    network, images = small().double(), torch.randn(6, 3, 64, 64, dtype=torch.float64)
    norm = FromContext(slice(0, 4))
    expected, _ = network(images, norm)
    found, _ = network(images, Given(*norm.statistics()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_statistics_of_a_context_do_not_depend_on_the_rows_outside_it() -> None:
    network, images = small().double(), torch.randn(6, 3, 64, 64, dtype=torch.float64)
    alone, accompanied = FromContext(), FromContext(slice(0, 4))
    network(images[:4], alone)
    network(images, accompanied)
    for expected, found in zip(alone.statistics(), accompanied.statistics(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_variance_is_the_population_variance_over_images_and_space() -> None:
    network, images = small().double(), torch.randn(5, 3, 64, 64, dtype=torch.float64)
    norm = FromContext()
    network(images, norm)
    first = network.conv1(images)
    torch.testing.assert_close(norm.means[0], first.mean((0, 2, 3)))
    torch.testing.assert_close(norm.variances[0], first.var((0, 2, 3), unbiased=False))


def test_averaging_statistics_of_chunks_is_not_one_pass_over_both() -> None:
    network = small().double()
    images = torch.cat([torch.randn(4, 3, 64, 64) * 0.3, torch.randn(4, 3, 64, 64) * 3 + 1]).double()
    whole, first, second = FromContext(), FromContext(), FromContext()
    network(images, whole)
    network(images[:4], first)
    network(images[4:], second)
    mean, variance = whole.statistics()
    averaged = (first.statistics()[0] + second.statistics()[0]) / 2
    assert ((averaged - mean).abs() / torch.sqrt(variance + EPS)).max() > 0.1


def test_given_statistics_that_carry_gradients_are_refused_rather_than_silently_detached() -> None:
    network, images = small(), torch.randn(4, 3, 64, 64)
    norm = FromContext()
    network(images, norm)
    with pytest.raises(RuntimeError, match="not differentiable"):
        network(images, Given(*norm.statistics()))


def test_gradients_flow_through_the_statistics_as_finite_differences_say() -> None:
    network = small(antialiased=False).double()
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)

    def loss(shift: torch.Tensor) -> torch.Tensor:
        moved = images.clone()
        moved[0, 1, 10:20, 10:20] += shift  # a control image alone: the treated rows feel it only by the statistics
        logits, _ = network(moved, FromContext(slice(0, 2)))
        return logits[2:].square().sum()

    at = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(at), at)
    step = 1e-5
    with torch.no_grad():
        difference = (loss(torch.tensor(step)) - loss(torch.tensor(-step))) / (2 * step)
    assert gradient.abs() > 1e-4
    torch.testing.assert_close(gradient, difference, rtol=1e-4, atol=1e-8)


def test_stopping_the_gradient_changes_the_gradient_but_not_the_answer() -> None:
    network, images = small(), torch.randn(6, 3, 64, 64)
    answers, gradients = [], []
    for stop in (False, True):
        network.zero_grad()
        logits, _ = network(images, FromContext(slice(0, 3), stop_gradient=stop))
        logits[3:].square().sum().backward()
        answers.append(logits.detach())
        gradients.append(network.conv1.weight.grad.clone())
    torch.testing.assert_close(answers[0], answers[1])
    assert (gradients[0] - gradients[1]).norm() > 0.01 * gradients[0].norm()


def test_running_statistics_are_torchs_own() -> None:
    network, reference = small(), torch.nn.BatchNorm2d(4, momentum=0.02)
    images = torch.randn(5, 3, 64, 64)
    first = network.conv1(images)
    reference.train()(first)
    network(images, Running(update=True))
    torch.testing.assert_close(network.bn1.running_mean, reference.running_mean)
    torch.testing.assert_close(network.bn1.running_var, reference.running_var)
    kept = network.running_statistics()
    network(images, Running(update=False))
    torch.testing.assert_close(network.running_statistics(), kept)


@torch.no_grad()
def test_running_statistics_given_as_values_answer_the_same() -> None:
    network, images = small(), torch.randn(5, 3, 64, 64)
    network(images, Running(update=True))
    expected, _ = network(images, Running(update=False))
    found, _ = network(images, Given(*network.running_statistics()))
    torch.testing.assert_close(found, expected)


def test_an_instance_normalised_image_does_not_feel_its_neighbours() -> None:
    network, images = small(), torch.randn(4, 3, 64, 64)
    together, _ = network(images, PerInstance())
    alone, _ = network(images[1:2], PerInstance())
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


def test_a_gain_and_offset_on_every_image_of_a_batch_vanish() -> None:
    network, images = small().double(), torch.randn(6, 3, 64, 64, dtype=torch.float64)
    padded = torch.nn.functional.pad(images, (8, 8, 8, 8), mode="reflect")

    def logits(batch: torch.Tensor) -> torch.Tensor:
        return network(batch, FromContext(slice(0, 3)))[0][3:]

    torch.testing.assert_close(logits(padded * 7.0), logits(padded), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_an_ensemble_is_its_members_asked_one_by_one() -> None:
    members, images = [small(seed=seed).double() for seed in (1, 2, 3)], torch.randn(5, 3, 64, 64, dtype=torch.float64)
    ensemble, together = Ensemble(members), FromContext(slice(0, 3))
    logits, embeddings = ensemble(images, together)
    assert logits.shape == (5, 3, 4)
    assert (ensemble.features, ensemble.embedding_dim) == (3 * members[0].features, 3 * members[0].embedding_dim)
    statistics = []
    for number, member in enumerate(members):
        norm = FromContext(slice(0, 3))
        expected, embedding = member(images, norm)
        torch.testing.assert_close(logits[:, number], expected)
        torch.testing.assert_close(embeddings[:, 32 * number : 32 * (number + 1)], embedding)
        statistics.append(norm.statistics())
    for found, parts in zip(together.statistics(), zip(*statistics, strict=True), strict=True):
        torch.testing.assert_close(found, torch.cat(parts))
    again, _ = ensemble(images, Given(*together.statistics()))
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_network_is_itself_after_it_joined_an_ensemble() -> None:
    first, second = small(seed=1), small(seed=2)
    images = torch.randn(4, 3, 64, 64)
    norm = FromContext()
    expected, _ = second(images, norm)
    ensemble = Ensemble([first, second])
    found, _ = second(images, Given(*norm.statistics()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    second.classifier.bias += 1
    torch.testing.assert_close(ensemble(images, FromContext())[0][:, 1], expected)


@torch.no_grad()
def test_an_ensembles_running_statistics_are_its_members() -> None:
    members, images = [small(seed=1), small(seed=2)], torch.randn(4, 3, 64, 64)
    for member in members:
        member(images, Running(update=True))
    mean, variance = Ensemble(members).running_statistics()
    torch.testing.assert_close(mean, torch.cat([member.running_statistics()[0] for member in members]))
    torch.testing.assert_close(variance, torch.cat([member.running_statistics()[1] for member in members]))


@torch.no_grad()
def test_members_that_know_other_means_and_scales_take_images_normalised_as_the_firsts() -> None:
    members, raw = [small(seed=1), small(seed=2)], torch.rand(4, 3, 64, 64)
    means = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.1, 0.2]])
    stds = torch.tensor([[0.5, 0.6, 0.7], [0.9, 0.4, 0.3]])
    ensemble = Ensemble(members, shifts=(means[0] - means) / stds, scales=stds[0] / stds)
    normalised = [(raw - mean[:, None, None]) / std[:, None, None] for mean, std in zip(means, stds, strict=True)]
    found, _ = ensemble(normalised[0], FromContext())
    for number, member in enumerate(members):
        expected, _ = member(normalised[number], FromContext())
        torch.testing.assert_close(found[:, number], expected, rtol=1e-3, atol=1e-3)


def test_an_ensemble_of_none_or_of_unlike_networks_is_refused() -> None:
    for networks in ([], [small(), small(antialiased=False)]):
        with pytest.raises(ValueError, match="one architecture"):
            Ensemble(networks)


@torch.no_grad()
def test_the_published_pooling_averages_seven_by_seven_and_then_the_rest() -> None:
    spec = NetworkSpec(channels=3, classes=4, width=4, pooling="mean-of-7x7")
    torch.manual_seed(0)
    network, plain = ResNet(spec), small(antialiased=False)
    plain.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 256, 256)
    maps: list[torch.Tensor] = []
    network.blocks[-1].register_forward_hook(lambda _module, _given, found: maps.append(found))
    logits, embedding = network(images, FromContext())
    assert maps[0].shape[2:] == (8, 8)
    middle = torch.nn.AvgPool2d(7, stride=1)(maps[0]).flatten(2).mean(2)
    torch.testing.assert_close(embedding, middle)
    torch.testing.assert_close(logits, network.classifier(middle))
    assert not torch.allclose(embedding, plain(images, FromContext())[1], atol=1e-3)
    with pytest.raises(RuntimeError, match="too small"):
        network(images[:, :, :128, :128], FromContext())
