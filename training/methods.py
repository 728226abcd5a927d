"""The methods, on one screen: how each network is trained, and the ways in which trained networks are used.

``NETWORKS`` says where the BN layers of a network take their statistics from while it is trained. ``WAYS`` says which of
them a method uses, and where the statistics come from when a new plate is classified. It knows nothing of plates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)

from model.network import FromContext, Given, Normaliser, PerInstance, PriorTensors, ResNet, Running
from model.statistics import Prior
from training.episodes import Episode

Context = Literal["source", "controls", "union", "panel", "treated", "instance"]
Blend = Literal["none", "training", "swept"]
_CHUNK = 64


@dataclass(frozen=True)
class Method:
    """A trained network: the context of its training, and whether gradients stop at the statistics."""

    name: str
    context: Context
    stop_gradient: bool = False

    @property
    def with_controls(self) -> bool:
        """Whether episodes hold control images."""
        return self.context in ("controls", "union", "panel")

    @property
    def zscore(self) -> bool:
        """Whether inputs are z-scored by the plate's controls."""
        return self.name == "erm-zscore"

    @property
    def needs_controls(self) -> bool:
        """Whether it can't be trained on plates without negative controls."""
        return self.with_controls or self.zscore


NETWORKS = MappingProxyType(
    {
        "erm": Method("erm", "source"),  # running statistics of the training plates
        "erm-zscore": Method("erm-zscore", "source"),  # the same, inputs z-scored by the plate's controls
        "instancenorm": Method("instancenorm", "instance"),  # every image by its own statistics
        "arm-bn": Method("arm-bn", "treated"),  # statistics of the plate's treated images
        "cs-arm-bn": Method("cs-arm-bn", "controls"),  # … of its control images
        "cs-arm-bn-union": Method("cs-arm-bn", "union"),  # … of both together
        "cs-arm-bn-panel": Method("cs-arm-bn", "panel"),  # … of its controls and a fixed set of treated wells
        "cs-arm-bn-stopgrad": Method("cs-arm-bn", "controls", stop_gradient=True),  # no gradient through the statistics
    }
)
METHODS = tuple(dict.fromkeys(method.name for method in NETWORKS.values()))


@dataclass(frozen=True)
class Way:
    """One way to use a network on a new plate; tables name it by method, context and whether it is blended.

    ``blend`` mixes source moments into the measured ones at every layer: ``training`` with weight N / (N + control wells),
    each layer's N estimated on training plates; ``swept`` with weight N / (N + images), N chosen on validation plates.
    """

    method: str
    network: str
    context: Context
    blend: Blend = "none"

    @property
    def name(self) -> str:
        """Its name in a grid: the method, then the context and ``blended`` where the method alone does not tell."""
        shared = {way.context for way in WAYS if way.method == self.method} != {self.context}
        return " ".join([self.method, *([self.context] if shared else []), *(["blended"] if self.blended else [])])

    @property
    def blended(self) -> bool:
        """Whether few controls are blended with what training plates look like."""
        return self.blend == "training"

    @property
    def trained(self) -> Method:
        """The network used."""
        return NETWORKS[self.network]

    @property
    def uses_controls(self) -> bool:
        """Whether the plate's controls matter to its answers."""
        return self.context in ("controls", "union", "panel") or self.trained.zscore

    @property
    def needs_controls(self) -> bool:
        """Whether it can't be used where there are no negative controls, on a new plate or in training."""
        return self.uses_controls or (self.context == "source" and self.trained.needs_controls)

    @property
    def independent(self) -> bool:
        """Whether a well's answer does not depend on which other wells are sent with it."""
        return self.context not in ("union", "treated")


WAYS = (
    #   method                network               context     blend
    Way("erm",                "erm",                "source"),
    Way("erm-zscore",         "erm-zscore",         "source"),
    Way("instancenorm",       "instancenorm",       "instance"),
    Way("adabn-controls",     "erm",                "controls"),
    Way("adabn-treated",      "erm",                "treated"),
    Way("adabn-union",        "erm",                "union"),
    Way("prior-bn",           "erm",                "controls", "swept"),
    Way("prior-bn",           "erm",                "treated",  "swept"),
    Way("arm-bn",             "arm-bn",             "treated"),
    Way("cs-arm-bn",          "cs-arm-bn",          "controls"),
    Way("cs-arm-bn",          "cs-arm-bn",          "controls", "training"),
    Way("cs-arm-bn",          "cs-arm-bn",          "source"),
    Way("cs-arm-bn",          "cs-arm-bn-union",    "union"),
    Way("cs-arm-bn",          "cs-arm-bn-panel",    "panel"),
    Way("cs-arm-bn-stopgrad", "cs-arm-bn-stopgrad", "controls"),
)  # fmt: skip


def make_method(name: str, context: str = "controls", *, stop_gradient: bool = False) -> Method:
    """Return what is trained under a name; ``context`` and ``stop_gradient`` matter to cs-arm-bn alone.

    Raises:
        ValueError: no such method, or a context that cs-arm-bn does not have.
    """
    if name not in METHODS:
        raise ValueError(f"no method {name!r}; expected one of {', '.join(METHODS)}")
    found = [method for method in NETWORKS.values() if method.name == name]
    if len(found) == 1:
        return found[0]
    contexts = sorted({method.context for method in found})
    if context not in contexts:
        raise ValueError(f"{name} has the contexts {', '.join(contexts)}, not {context!r}")
    chosen = next(method for method in found if method.context == context)
    return Method(name, chosen.context, stop_gradient)


def training_loss(network: ResNet, method: Method, episodes: Sequence[Episode]) -> Tensor:
    """Cross-entropy on the treated images: the mean over the step's plates, or over one mixed minibatch for erm."""
    if method.context == "source":
        images = torch.cat([episode.images for episode in episodes])
        logits, _ = network(images, Running(update=True))
        return F.cross_entropy(logits, torch.cat([episode.labels for episode in episodes]))
    losses = []
    for episode in episodes:
        logits, _ = network(episode.images, _episode_normaliser(method, episode))
        losses.append(F.cross_entropy(logits[episode.treated], episode.labels))
    return torch.stack(losses).mean()


def _episode_normaliser(method: Method, episode: Episode) -> Normaliser:
    if method.context == "instance":
        return PerInstance()
    whole = method.context in ("union", "treated")
    return FromContext(None if whole else episode.context, stop_gradient=method.stop_gradient)


# --- evaluation ------------------------------------------------------------------------------------------------------

Answers = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Logits (rows, classes) and embeddings (rows, dim)."""


@torch.no_grad()
def measured(network: ResNet, images: NDArray[np.float32], prior: Prior | None = None) -> Given:
    """Statistics of images (rows, channels, size, size) as one context, in one pass; blended with a prior, if any."""
    norm = FromContext(prior=None if prior is None else prior_tensors(network, prior))
    network(_tensor(network, images), norm)
    return Given(*norm.statistics())


@torch.no_grad()
def classify(network: ResNet, images: NDArray[np.float32], norm: Normaliser) -> Answers:
    """Logits and embeddings of images, in chunks."""
    parts = [network(_tensor(network, images[at : at + _CHUNK]), norm) for at in range(0, len(images), _CHUNK)]
    logits = torch.cat([logits for logits, _ in parts]).cpu().numpy()
    return logits, torch.cat([embedding for _, embedding in parts]).cpu().numpy()


@torch.no_grad()
def classify_context(network: ResNet, images: NDArray[np.float32], prior: Prior | None = None) -> Answers:
    """Classify images by statistics of all of them, in the pass that measures them."""
    norm = FromContext(prior=None if prior is None else prior_tensors(network, prior))
    logits, embeddings = network(_tensor(network, images), norm)
    return logits.cpu().numpy(), embeddings.cpu().numpy()


def prior_tensors(network: ResNet, prior: Prior) -> PriorTensors:
    """A prior as a network takes it: its device and type."""
    like = next(network.parameters())
    return PriorTensors(like.new_tensor(prior.mean), like.new_tensor(prior.variance), like.new_tensor(prior.weight))


def _tensor(network: ResNet, images: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(images).to(network.conv1.weight.device)
