"""``marm train --config``."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.cli.train import read_config


def test_a_file_sets_everything(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(
        "batch_size: 64\n"
        "models:\n"
        "  - {stage: ranking, feedback_signals: [like], namespace: {depth: 1, dim: 8}, depth: 1,\n"
        "     attention_dim: 8}\n"
    )
    config = read_config(path)
    assert config.batch_size == 64
    assert config.models[0].feedback_signals == ("like",)
    assert config.namespace.dim == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must be a mapping"),
        ("a: [", "is not YAML"),
        ("batch_sise: 3", r"unknown training settings \['batch_sise'\]"),
        ("batch_size: many", "wrong type"),
        ("models: [{stage: sorting}]", "stage must be one of"),
        ("models: [{dept: 3}]", r"unknown model settings \['dept'\]"),
    ],
)
def test_a_bad_file_is_a_clear_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(path)


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read"):
        read_config(tmp_path / "none.yaml")
