"""A process that accepts and settles as fast as it can until it is killed: `python -m ... DIRECTORY`.

Prints the number of each request after it is written down: `a NUMBER` or `s NUMBER`.
"""

import sys
from pathlib import Path

from service.billing.write_ahead_log import WriteAheadLog
from tests.billing.common import ledger_row

journal = WriteAheadLog(Path(sys.argv[1]))
print(journal.id, flush=True)
open_numbers: list[int] = []
while True:
    number = journal.accepted(ledger_row(outcome="lost", cost_usd=0.0, device_s=0.0))
    print("a", number, flush=True)
    open_numbers.append(number)
    if len(open_numbers) > 3:
        number = open_numbers.pop(0)
        journal.settled(number, ledger_row())
        print("s", number, flush=True)
