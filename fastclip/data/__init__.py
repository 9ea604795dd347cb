"""Datasets, read as batches of images, captions and labels."""

from typing import TYPE_CHECKING

from fastclip.system.lazy import lazy_names

if TYPE_CHECKING:
    from fastclip.data.batch import Batch
    from fastclip.data.faults import BadSample, Fault
    from fastclip.data.loading.batches import evaluation_batches, training_batches
    from fastclip.data.loading.order import Order
    from fastclip.data.source import Record, Source
    from fastclip.data.spec import open_source

__all__ = [
    "BadSample",
    "Batch",
    "Fault",
    "Order",
    "Record",
    "Source",
    "evaluation_batches",
    "open_source",
    "training_batches",
]

_LAZY = {
    "BadSample": "fastclip.data.faults",
    "Batch": "fastclip.data.batch",
    "Fault": "fastclip.data.faults",
    "Order": "fastclip.data.loading.order",
    "Record": "fastclip.data.source",
    "Source": "fastclip.data.source",
    "evaluation_batches": "fastclip.data.loading.batches",
    "open_source": "fastclip.data.spec",
    "training_batches": "fastclip.data.loading.batches",
}
__getattr__ = lazy_names(globals(), _LAZY)


def __dir__() -> list[str]:
    return __all__
