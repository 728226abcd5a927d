"""Tables of evaluations: means over plates with intervals bootstrapped over plates."""

import numpy as np
import pandas as pd

_METRICS = {
    "image_accuracy": "per image",
    "well_accuracy": "per well",
    "mixed_well_accuracy": "few wells, mixed",
    "one_class_well_accuracy": "few wells, one class",
}
_RESAMPLES = 2000


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Average scores over plates: one row a method, context and setting, with a 95 % interval per metric."""
    rows = []
    for key, group in table.groupby(["method", "context", "setting"], sort=False):
        row: dict[str, object] = dict(zip(("method", "context", "setting"), key, strict=True))
        row["plates"] = group["plate"].nunique()
        for metric in _METRICS:
            if metric in group and group[metric].notna().all():
                row[metric] = float(group[metric].mean())
                row[f"{metric}_low"], row[f"{metric}_high"] = bootstrap(group[metric].to_numpy(dtype=float))
        rows.append(row)
    return pd.DataFrame(rows)


def bootstrap(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean, resampling plates."""
    rng = np.random.default_rng(seed)
    means = rng.choice(values, (_RESAMPLES, len(values))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def markdown_table(summary: pd.DataFrame) -> str:
    """Format a summary: a row a method and setting."""
    lines = [
        "| method | context | setting | plates | " + " | ".join(_METRICS.values()) + " |",
        "| --- | --- | --- | ---: |" + " --- |" * len(_METRICS),
    ]
    for _, row in summary.iterrows():
        cells = [str(row["method"]), str(row["context"]), str(row["setting"]).replace("_", " "), str(row["plates"])]
        lines.append("| " + " | ".join([*cells, *(_cell(row, metric) for metric in _METRICS)]) + " |")
    return "\n".join(lines)


def _cell(row: "pd.Series", metric: str) -> str:
    if metric not in row or pd.isna(row[metric]):
        return ""
    return f"{row[metric]:.3f} ({row[f'{metric}_low']:.3f} to {row[f'{metric}_high']:.3f})"
