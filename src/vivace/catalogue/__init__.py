"""The catalogue of the field as data: every published method we know of, and what this installation implements.

`methods` holds the field (families, claims, sources, status); `entries` holds our own techniques, read from their
cards. Nothing here imports torch, and nothing is measured here: `newest_record` looks into a folder of records.
"""

from __future__ import annotations

from vivace.catalogue.cards import Entry, Setting, entries, entry
from vivace.catalogue.field import (
    families,
    method,
    methods,
    methods_of,
    search,
    select,
)
from vivace.catalogue.measured import Measured, measurements, newest_record, read_records
from vivace.catalogue.schema import EVIDENCE, Claim, Family, Method, Peer, SubFamily

__all__ = [
    "EVIDENCE",
    "Claim",
    "Entry",
    "Family",
    "Measured",
    "Method",
    "Peer",
    "Setting",
    "SubFamily",
    "entries",
    "entry",
    "families",
    "measurements",
    "method",
    "methods",
    "methods_of",
    "newest_record",
    "read_records",
    "search",
    "select",
]
