"""The history of a run: a row of figures for each epoch."""

from typing import Any

Row = dict[str, Any]

COLUMNS = (
    "epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy",
    "epoch_seconds", "images_per_second", "data_wait_seconds",
)  # fmt: skip
VALIDATION_COLUMNS = ("val_loss", "val_accuracy")


def selection_accuracy(row: Row) -> float:
    """The accuracy, in percent, by which an epoch is selected: on the validation images if there are any."""
    return row["val_accuracy" if "val_accuracy" in row else "test_accuracy"]


def best_row(history: list[Row]) -> Row:
    """The first epoch of the highest ``selection_accuracy``."""
    return max(history, key=selection_accuracy)


def target_row(history: list[Row], target: float | None) -> Row | None:
    """The first epoch whose ``selection_accuracy`` is ``target`` or more."""
    return next((row for row in history if target is not None and selection_accuracy(row) >= target), None)


def check_history(history: Any, validated: bool) -> None:
    """Raises ValueError unless ``history`` is a list of complete rows of epochs 1, 2, ..."""
    columns = COLUMNS + (VALIDATION_COLUMNS if validated else ())
    if not isinstance(history, list):
        raise ValueError("its history is not a list")
    for i, row in enumerate(history):
        if (
            not isinstance(row, dict)
            or not row.keys() >= set(columns)
            or not all(type(value) in (int, float) for value in row.values())
            or row["epoch"] != i + 1
            or not row["epoch_seconds"] > 0
        ):
            raise ValueError(f"its history has no proper row of epoch {i + 1}")
