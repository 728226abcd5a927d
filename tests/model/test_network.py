"""Mathematics of the BN layers against references: torch's own BN, float64 finite differences, published sizes."""

import pytest
import torch

from model.network import EPS, BatchNorm, FromContext, Given, NetworkSpec, PerInstance, ResNet, Running


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


def written_out(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, context: slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    variance, mean = torch.var_mean(x[context], dim=(0, 2, 3), correction=0)
    scaled = (x - mean[:, None, None]) / torch.sqrt(variance + EPS)[:, None, None]
    return scaled * weight[:, None, None] + bias[:, None, None], mean, variance


@pytest.mark.parametrize("context", [slice(None), slice(0, 3), slice(2, 5)])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_fused_normalisation_has_the_gradients_that_torch_finds_for_the_formula(
    context: slice, memory: torch.memory_format
) -> None:
    torch.manual_seed(1)
    x = (3 * torch.randn(5, 4, 6, 6, dtype=torch.float64) + 1).to(memory_format=memory).requires_grad_()
    layer = BatchNorm(4).double()
    torch.nn.init.uniform_(layer.weight)
    torch.nn.init.uniform_(layer.bias)
    norm = FromContext(context)
    found = (norm(x, layer), norm.means[0], norm.variances[0])
    expected = written_out(x, layer.weight, layer.bias, context)
    inputs = (x, layer.weight, layer.bias)
    for outputs in ([0], [0, 1, 2], [1], [2]):  # the answer alone, with the statistics, and the statistics alone
        cotangents = [torch.randn_like(expected[i]) for i in outputs]
        gradients = [
            torch.autograd.grad([values[i] for i in outputs], inputs, cotangents, retain_graph=True, materialize_grads=True)
            for values in (expected, found)
        ]
        for reference, gradient in zip(*gradients, strict=True):
            torch.testing.assert_close(gradient, reference)
    for reference, value in zip(expected, found, strict=True):
        torch.testing.assert_close(value, reference)


@pytest.mark.parametrize("stop_gradient", [False, True])
@pytest.mark.parametrize("measuring", [False, True])
def test_statistics_are_float32_where_the_rest_is_bfloat16(stop_gradient: bool, measuring: bool) -> None:
    torch.manual_seed(0)
    x = (torch.randn(64, 4, 24, 24) + 30).to(torch.bfloat16)  # a bfloat16 mean of 30 is off by up to 0.06
    norm, layer = FromContext(slice(0, 32), stop_gradient=stop_gradient), BatchNorm(4)
    with torch.set_grad_enabled(not measuring):
        answer = norm(x, layer)
    assert answer.dtype == torch.bfloat16
    variance, mean = torch.var_mean(x[:32].double(), dim=(0, 2, 3), correction=0)
    assert norm.means[0].dtype == norm.variances[0].dtype == torch.float32
    torch.testing.assert_close(norm.means[0].double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.variances[0].double(), variance, rtol=1e-5, atol=0)


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
