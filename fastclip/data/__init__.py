"""Data sets as batches of images, captions and labels."""

from fastclip.data.batch import Batch
from fastclip.data.faults import BadSample, Fault
from fastclip.data.loader import evaluation_batches, training_batches
from fastclip.data.order import Order
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
