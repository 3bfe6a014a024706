"""Records of every public loss; a loss joins every test by ``RECORDS`` of a module in this folder."""

from importlib import import_module
from pkgutil import iter_modules

from tests.records.record import Record

_NO_RECORDS = {"record", "running"}  # what a record is, and how one is run

RECORDS: list[Record] = [
    record
    for module in iter_modules(__path__)
    if module.name not in _NO_RECORDS
    for record in import_module(f"{__name__}.{module.name}").RECORDS
]
