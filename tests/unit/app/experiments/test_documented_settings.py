"""The settings that are shown to people are ones that are accepted."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from app.args import AppArgs
from app.experiments.table import experiment_table

REPO = Path(__file__).resolve().parents[4]
PAGE = (REPO / "docs/serving/experiments.md").read_text()


def block(name: str) -> dict:
    (found,) = re.findall(rf"```yaml {name}\n(.*?)```", PAGE, re.DOTALL)
    return yaml.safe_load(found)


def test_the_page_shows_settings_that_are_accepted():
    args = AppArgs.model_validate(block("args"))
    table = experiment_table(args.routing, args.arms(), block("user_config"))
    assert args.controls()["ranking"] == "marm-l2"
    assert table.assign(42, {"ranking": "marm-l4"}).overridden == ("ranking",)


def test_the_example_in_the_shipped_config_is_accepted():
    """Commented out there, since it needs a second published variant."""
    text = (REPO / "serve_config.yaml").read_text()
    text = text.replace("        variants: {default: {}}\n        # variants:", "        variants:")
    start = text.index("      # routing:")
    end = text.index("      limits:", start)
    live = re.sub(r"^      # ", "      ", text[start:end], flags=re.MULTILINE)
    text = text[:start] + live + text[end:]
    text = text.replace(
        "          experiments: {}\n          # experiments:", "          experiments:"
    )
    (application,) = yaml.safe_load(text)["applications"]
    args = AppArgs.model_validate(application["args"])
    (ingress,) = [it for it in application["deployments"] if it["name"] == "ingress"]
    assert set(ingress["user_config"]["experiments"]) == set(args.routing.experiments)
    experiment_table(args.routing, args.arms(), ingress["user_config"])
