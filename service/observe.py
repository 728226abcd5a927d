"""The edge to metrics: whoever does the work says how long and how much, and knows nothing of who counts."""

from typing import Protocol


class Observer(Protocol):
    """Is told of work that was done."""

    def stage(self, stage: str, seconds: float) -> None:
        """Count time of a stage: queue, decode, preprocess, infer, store."""
        ...

    def sites(self, graph: str, count: int) -> None:
        """Count the sites of one pass of the network."""
        ...


class Unobserved:
    """Counts nothing."""

    def stage(self, stage: str, seconds: float) -> None:
        pass

    def sites(self, graph: str, count: int) -> None:
        pass


UNOBSERVED: Observer = Unobserved()
