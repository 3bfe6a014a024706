"""One record of every public loss; a loss joins every test by joining this table."""

from tests.records import distillation, heads, invariance, ipirm, similarity
from tests.records.record import Record

RECORDS: list[Record] = [
    record for topic in (similarity, invariance, ipirm, distillation, heads) for record in topic.RECORDS
]
