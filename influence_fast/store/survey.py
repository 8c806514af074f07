"""One pass over a dataset: what it is made of, and what is wrong with it, before any gradient is computed."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from influence_fast.data.fingerprints import dataset_fingerprint
from influence_fast.data.held import as_examples
from influence_fast.errors import DataError
from influence_fast.store.ids import UniqueIds
from influence_fast.store.shard_rows import id_of


def held(dataset: Any) -> Sequence[Any]:
    """Return a dataset of texts as it is, tokenized examples in the one form."""
    if isinstance(dataset, Iterator):
        dataset = list(dataset)
    if isinstance(dataset, Sequence) and len(dataset) > 0 and hasattr(dataset[0], "prompt"):
        return dataset
    return as_examples(dataset, numbered=True)


@dataclass(frozen=True)
class Survey:
    """Facts of a dataset that one pass finds out, in a few bytes an example."""

    fingerprint: str
    texts: bool  # examples as text, not as tokens
    sizes: np.ndarray  # [N] int64: tokens, or characters of texts

    @classmethod
    def of(cls, dataset: Sequence[Any]) -> Survey:
        """Look over a dataset once.

        Raises DataError naming the place of an example without an id, or of another kind than the first; StoreError
        naming ids that come twice."""
        texts = len(dataset) > 0 and not isinstance(dataset[0], Mapping)
        sizes, seen = array("q"), UniqueIds()

        def checked() -> Iterator[Any]:
            for place, example in enumerate(dataset):
                check_example(example, place, texts)
                seen.add([id_of(example)])
                sizes.append(len(example.prompt) + len(example.completion) if texts else len(example["input_ids"]))
                yield example

        fingerprint = dataset_fingerprint(checked())
        seen.check(lambda: (id_of(example) for example in dataset), "the dataset")
        return cls(fingerprint, texts, np.array(sizes, dtype=np.int64))

    def shard_sizes(self, ranges: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
        """Return (examples, sum of their sizes) of each shard, of `Manifest.ranges`."""
        shards = [self.sizes[offset + first : offset + last] for offset, first, last in ranges]
        return [(len(sizes), int(sizes.sum())) for sizes in shards]


def check_example(example: Any, place: int, texts: bool) -> None:
    """Raise DataError for what is no example, or of another kind than the dataset's first."""
    if isinstance(example, Mapping) == texts:
        raise DataError(f"dataset[{place}]: texts and tokenized examples are mixed; give one kind")
    if not texts and not {"id", "input_ids", "labels"} <= example.keys():
        raise DataError(f"dataset[{place}]: a tokenized example is {{'id', 'input_ids', 'labels'}}")
    name = id_of(example)
    if not isinstance(name, str):
        raise DataError(f"dataset[{place}]: its id must be a string, not {name!r}")
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise DataError(f"dataset[{place}]: its id {name!r} holds half a surrogate pair; give another")
