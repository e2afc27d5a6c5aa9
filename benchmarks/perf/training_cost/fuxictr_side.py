"""FuxiCTR's DIN in one test-then-train pass; runs in an environment that has FuxiCTR and not us.

    python fuxictr_side.py events.npz scores.npy SETTINGS_JSON

Started by `benchmarks.perf.training_cost.fuxictr`, which says what is compared. Writes a prediction
for every event, made before its batch was learned, and prints one JSON line.

Shape legend: B events, n rows of a history.
"""

from __future__ import annotations

import json
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.torch_utils import seed_everything
from model_zoo.LongCTR.DIN.DIN import DIN
from numpy.typing import NDArray

_PADDING, _NEGATIVE, _POSITIVE, _TARGET = 0, 1, 2, 3
_MAX_GRADIENT_NORM = 10.0  # what its `fit` takes by default

Batch = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]
"""What its DIN takes: features of the event, of the rows and the target, and the mask of rows."""


class StreamedDin(DIN):
    """DIN with what `fit` sets before the first step: here steps are taken one by one."""

    def __init__(self, feature_map: FeatureMap, **settings: Any) -> None:
        super().__init__(feature_map, **settings)
        self._max_gradient_norm = _MAX_GRADIENT_NORM
        self._batch_index = 0


class Stream:
    """The log, in time order, as `benchmarks.perf.training_cost.fuxictr.export` writes it."""

    def __init__(self, columns: Mapping[str, NDArray], history_length: int) -> None:
        self.user, self.item, self.tag = (columns[name] for name in ("user", "item", "tag"))
        self.label = columns["label"]  # -1: not observed
        self._past, self._history_length = columns["past"], history_length
        self._by_user = np.argsort(self.user, kind="stable")
        starts = np.searchsorted(self.user[self._by_user], np.arange(self.user.max() + 1))
        self._end = starts[self.user] + self._past  # of each event's past in that order

    def batch(self, begin: int, end: int) -> Batch:
        """Events ``begin`` to ``end``, each with its newest n predecessors, newest last."""
        past, last = self._past[begin:end], self._end[begin:end]
        longest = int(np.clip(past.max(), 1, self._history_length))
        age = np.arange(longest, 0, -1)
        seen = age[None, :] <= past[:, None]
        rows = self._by_user[np.where(seen, last[:, None] - age[None, :], 0)]
        feedback = np.where(self.label[rows] > 0, _POSITIVE, _NEGATIVE)
        target = np.arange(begin, end)
        columns = {
            "item": (self.item[rows], self.item[target]),
            "tag": (self.tag[rows], self.tag[target]),
            "feedback": (feedback, np.full(len(target), _TARGET)),
        }
        items = {
            name: torch.from_numpy(np.hstack([np.where(seen, row, _PADDING), own[:, None]]).ravel())
            for name, (row, own) in columns.items()
        }
        event = {
            "user": torch.from_numpy(self.user[target]),
            "label": torch.from_numpy(self.label[target].astype(np.float32)),
        }
        return event, items, torch.from_numpy(seen.astype(np.float32))


def main() -> None:
    """Predict and learn every batch."""
    events_path, scores_path, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    torch.set_num_threads(1)
    with np.load(events_path, allow_pickle=False) as columns:
        stream = Stream(columns, settings["history_length"])
    seed_everything(settings["seed"])
    model = build_model(stream, settings)
    scores = np.zeros(len(stream.user), np.float32)
    trained, cpu_s, elapsed_s = 0, 0.0, 0.0
    for begin in range(0, len(scores), settings["batch_size"]):
        end = min(begin + settings["batch_size"], len(scores))
        model.eval()
        with torch.no_grad():
            predicted = model(stream.batch(begin, end))["y_pred"]
        scores[begin:end] = predicted.numpy().ravel()
        batch = observed(stream.batch(begin, end))
        size = len(batch[2])
        model.train()
        if size < 2:  # its activations need statistics of a batch
            continue
        cpu_began, began = time.process_time(), time.perf_counter()
        model.train_step(batch)
        cpu_s += time.process_time() - cpu_began
        elapsed_s += time.perf_counter() - began
        trained += size
    np.save(scores_path, scores, allow_pickle=False)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found = {"trained_events": trained, "cpu_s": cpu_s, "elapsed_s": elapsed_s}
    print(json.dumps({**found, "parameters": parameters}))


def observed(batch: Batch) -> Batch:
    """Only the events with a label."""
    event, items, mask = batch
    kept = event["label"] >= 0
    if bool(kept.all()):
        return batch
    width = mask.shape[1] + 1
    return (
        {name: value[kept] for name, value in event.items()},
        {name: value.view(-1, width)[kept].ravel() for name, value in items.items()},
        mask[kept],
    )


def build_model(stream: Stream, settings: dict[str, Any]) -> StreamedDin:
    """Its DIN with its documented settings where ``settings`` say nothing else."""
    features = FeatureMap("stream", data_dir=".")
    item = {"source": "item", "type": "categorical", "padding_idx": _PADDING}
    features.features = OrderedDict(
        user={"source": "user", "type": "categorical", "vocab_size": int(stream.user.max()) + 1},
        item={**item, "vocab_size": int(stream.item.max()) + 1},
        tag={**item, "vocab_size": int(stream.tag.max()) + 1},
        feedback={**item, "vocab_size": _TARGET + 1},
    )
    features.labels = ["label"]
    features.default_emb_dim = settings["dim"]
    features.num_fields = features.get_num_fields()
    return StreamedDin(
        features,
        embedding_dim=settings["dim"],
        dnn_hidden_units=list(settings["dnn_hidden_units"]),
        attention_hidden_units=list(settings["attention_hidden_units"]),
        attention_hidden_activations=settings["attention_activation"],
        learning_rate=settings["learning_rate"],
        optimizer="adam",
        loss="binary_crossentropy",
        metrics=["AUC"],
        model_root=".",
        verbose=0,
    )


if __name__ == "__main__":
    main()
