"""Bars: measured values beside the bounds that were set for them, as one JSON list and one table."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Bar:
    """A measured value and its bounds; a value without bounds is shown for comparison."""

    name: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def holds(self) -> bool | None:
        """Whether the value lies within its bounds; None where it has none."""
        if self.at_least is None and self.at_most is None:
            return None
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)


def write_bars(bars: list[Bar], path: Path) -> None:
    """Write the bars as JSON, bounds only where set; intervals are for the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{name: value for name, value in asdict(bar).items() if value is not None and name != "interval"} for bar in bars]
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def read_bars(path: Path) -> list[Bar]:
    """Return the bars that a part wrote before; none where it never ran."""
    return [Bar(**row) for row in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []


def table(bars: list[Bar]) -> str:
    """Format the bars with whether each holds."""
    words = {True: "holds", False: "FAILS", None: ""}
    lines = ["| figure | value | 95 % interval | bound | |", "| --- | ---: | --- | ---: | --- |"]
    for bar in bars:
        bounds = [f"≥ {bar.at_least:g}"] if bar.at_least is not None else []
        bounds += [f"≤ {bar.at_most:g}"] if bar.at_most is not None else []
        interval = "" if bar.interval is None else f"{bar.interval[0]:.3f} to {bar.interval[1]:.3f}"
        lines.append(f"| {bar.name} | {bar.value:.3f} {bar.unit} | {interval} | {' '.join(bounds)} | {words[bar.holds]} |")
    return "\n".join(lines)


def conclude(bars: list[Bar], path: Path) -> None:
    """Write and print the bars, and end with 1 where one does not hold."""
    write_bars(bars, path)
    print(table(bars))
    if any(bar.holds is False for bar in bars):
        raise SystemExit(1)
