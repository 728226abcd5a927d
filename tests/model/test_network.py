"""Mathematics of the BN layers against references: torch's own BN, float64 finite differences, published sizes."""

from collections.abc import Callable

import pytest
import torch

from model.network import (
    EPS,
    BatchNorm,
    Ensemble,
    FromContext,
    Given,
    NetworkSpec,
    PerInstance,
    PriorTensors,
    ResNet,
    Running,
)


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


def assert_gradient_is_the_slope(loss: Callable[[torch.Tensor], torch.Tensor], larger_than: float) -> None:
    at = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(at), at)
    step = 1e-5
    with torch.no_grad():
        difference = (loss(torch.tensor(step)) - loss(torch.tensor(-step))) / (2 * step)
    assert gradient.abs() > larger_than
    torch.testing.assert_close(gradient, difference, rtol=1e-4, atol=1e-8)


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

    assert_gradient_is_the_slope(loss, larger_than=1e-4)


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


def some_prior(network: ResNet, weight: float | None = None) -> PriorTensors:
    """A prior far from what is measured, of a weight that differs from feature to feature unless one is given."""
    rng = torch.Generator().manual_seed(3)
    draws = [torch.rand(network.features, generator=rng, dtype=torch.float64) for _ in range(3)]
    fixed = draws[2] if weight is None else torch.full_like(draws[2], weight)
    return PriorTensors(4 * draws[0] - 2, 0.1 + 3 * draws[1], fixed)


class MixingRawMoments:
    """The blend as it is defined: E[x] and E[x²] of rows and prior mixed, every layer on inputs normalised so."""

    def __init__(self, context: slice, prior: PriorTensors) -> None:
        self.context = context
        self.prior = prior
        self.found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, x: torch.Tensor, layer: BatchNorm) -> torch.Tensor:
        rows = x[self.context].transpose(0, 1).flatten(1)
        at = slice(layer.offset, layer.offset + layer.features)
        mean, variance, weight = self.prior.mean[at], self.prior.variance[at], self.prior.weight[at]
        first = (1 - weight) * rows.mean(1) + weight * mean
        second = (1 - weight) * (rows**2).mean(1) + weight * (variance + mean**2)
        self.found.append((first, second - first**2))
        return torch.nn.functional.batch_norm(x, first, second - first**2, layer.weight, layer.bias, eps=EPS)


@torch.no_grad()
def test_a_blend_mixes_raw_moments_layer_by_layer() -> None:
    network, images = small().double(), torch.randn(6, 3, 64, 64, dtype=torch.float64)
    prior, context = some_prior(network), slice(0, 4)
    norm, reference = FromContext(context, prior=prior), MixingRawMoments(context, prior)
    logits, _ = network(images, norm)
    expected, _ = network(images, reference)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    for found, parts in zip(norm.statistics(), zip(*reference.found, strict=True), strict=True):
        torch.testing.assert_close(found, torch.cat(parts), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(network(images, Given(*norm.statistics()))[0], logits, rtol=0, atol=1e-9)


@torch.no_grad()
def test_blending_after_the_pass_is_not_blending_inside_it() -> None:
    network, images = small().double(), torch.randn(4, 3, 64, 64, dtype=torch.float64)
    inside, plain = FromContext(prior=some_prior(network, 0.5)), FromContext()
    network(images, inside)
    network(images, plain)
    after = (plain.statistics()[0] + some_prior(network).mean) / 2
    last = network.layers[-1].place
    torch.testing.assert_close(inside.statistics()[0][: network.bn1.features], after[: network.bn1.features])
    assert (inside.statistics()[0][last] - after[last]).abs().max() > 0.01


@torch.no_grad()
def test_a_prior_without_weight_changes_no_bit_and_one_of_all_weight_is_the_prior() -> None:
    network, images = small(), torch.randn(5, 3, 64, 64)
    nothing, everything = (
        PriorTensors(prior.mean.float(), prior.variance.float(), prior.weight.float())
        for prior in (some_prior(network, 0.0), some_prior(network, 1.0))
    )
    plain, unweighted, given = FromContext(), FromContext(prior=nothing), FromContext(prior=everything)
    expected, _ = network(images, plain)
    found, _ = network(images, unweighted)
    assert torch.equal(found, expected)
    for one, other in zip(plain.statistics(), unweighted.statistics(), strict=True):
        assert torch.equal(one, other)
    network(images, given)
    assert torch.equal(given.statistics()[0], everything.mean)
    assert torch.equal(given.statistics()[1], everything.variance)


def test_gradients_flow_through_blended_statistics_as_finite_differences_say() -> None:
    network = small(antialiased=False).double()
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    prior = some_prior(network, 0.4)

    def loss(shift: torch.Tensor) -> torch.Tensor:
        moved = images.clone()
        moved[0, 1, 10:20, 10:20] += shift
        logits, _ = network(moved, FromContext(slice(0, 2), prior=prior))
        return logits[2:].square().sum()

    assert_gradient_is_the_slope(loss, larger_than=1e-6)


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
