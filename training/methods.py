"""The methods: where each takes its BN statistics from, in training and when it is evaluated.

erm                 running statistics of the training plates
erm-zscore          inputs z-scored by the plate's controls, then as erm
instancenorm        every image by its own statistics
arm-bn              statistics of the treated images of the plate (ARM-BN)
cs-arm-bn controls  statistics of the plate's control images
cs-arm-bn union     statistics of control and treated images together
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)

from model.network import FromContext, Given, Network, Normaliser, PerInstance, ResNet, Running
from training.episodes import Episode

MethodName = Literal["erm", "erm-zscore", "instancenorm", "arm-bn", "cs-arm-bn"]
METHODS: tuple[MethodName, ...] = ("erm", "erm-zscore", "instancenorm", "arm-bn", "cs-arm-bn")
Context = Literal["source", "controls", "union", "treated", "instance"]
_CHUNK = 64


@dataclass(frozen=True)
class Method:
    """A method and the context its network is trained with."""

    name: MethodName
    context: Context
    stop_gradient: bool = False

    @property
    def with_controls(self) -> bool:
        """Whether episodes hold control images."""
        return self.context in ("controls", "union")

    @property
    def zscore(self) -> bool:
        """Whether inputs are z-scored by the plate's controls."""
        return self.name == "erm-zscore"


def make_method(name: str, context: str = "controls", *, stop_gradient: bool = False) -> Method:
    """Return a method by name; ``context`` matters to cs-arm-bn alone.

    Raises:
        ValueError: no such method, or a context that cs-arm-bn does not have.
    """
    fixed: dict[str, Context] = {
        "erm": "source",
        "erm-zscore": "source",
        "instancenorm": "instance",
        "arm-bn": "treated",
    }
    if name in fixed:
        return Method(cast("MethodName", name), fixed[name])
    if name != "cs-arm-bn":
        raise ValueError(f"no method {name!r}; expected one of {', '.join(METHODS)}")
    if context not in ("controls", "union"):
        raise ValueError(f"cs-arm-bn has the contexts controls and union, not {context!r}")
    return Method("cs-arm-bn", cast("Context", context), stop_gradient)


def training_loss(network: ResNet, method: Method, episodes: Sequence[Episode]) -> Tensor:
    """Cross-entropy on the treated images: the mean over the step's plates, or over one mixed minibatch for erm."""
    if method.context == "source":
        images = torch.cat([episode.images for episode in episodes])
        logits, _ = network(images, Running(update=True))
        return F.cross_entropy(logits, torch.cat([episode.labels for episode in episodes]))
    losses = []
    for episode in episodes:
        logits, _ = network(episode.images, _episode_normaliser(method, episode))
        losses.append(F.cross_entropy(logits[episode.controls :], episode.labels))
    return torch.stack(losses).mean()


def _episode_normaliser(method: Method, episode: Episode) -> Normaliser:
    if method.context == "instance":
        return PerInstance()
    rows = slice(0, episode.controls) if method.context == "controls" else slice(None)
    return FromContext(rows, stop_gradient=method.stop_gradient)


# --- evaluation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measured(network: Network, images: NDArray[np.float32]) -> Given:
    """Statistics of images (rows, channels, size, size) as one context, in one pass."""
    norm = FromContext()
    network(_tensor(network, images), norm)
    return Given(*norm.statistics())


def plate_normaliser(
    network: Network, context: Context, controls: NDArray[np.float32], treated: NDArray[np.float32]
) -> Normaliser:
    """Where the statistics for classifying ``treated`` come from, both (rows, channels, size, size)."""
    if context == "source":
        return Running(update=False)
    if context == "instance":
        return PerInstance()
    if context == "controls":
        return measured(network, controls)
    if context == "treated":
        return measured(network, treated)
    return measured(network, np.concatenate([controls, treated]))


@torch.no_grad()
def classify(
    network: Network, images: NDArray[np.float32], norm: Normaliser
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits (rows, classes; of an ensemble rows, members, classes) and embeddings (rows, dim) of images, in chunks."""
    parts = [network(_tensor(network, images[at : at + _CHUNK]), norm) for at in range(0, len(images), _CHUNK)]
    logits = torch.cat([logits for logits, _ in parts]).cpu().numpy()
    return logits, torch.cat([embedding for _, embedding in parts]).cpu().numpy()


def _tensor(network: Network, images: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(images).to(next(network.parameters()).device)
