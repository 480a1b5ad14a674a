"""Accept and settle requests as fast as possible until killed: `python -m tests.billing.log_writer DIRECTORY`.

Prints the number of each request after it is logged: `a NUMBER` or `s NUMBER`.
"""

import sys
from pathlib import Path

from service.billing.write_ahead_log import WriteAheadLog
from tests.billing.common import ledger_row

log = WriteAheadLog(Path(sys.argv[1]))
print(log.id, flush=True)
open_numbers: list[int] = []
while True:
    number = log.accepted(ledger_row(outcome="lost", cost_usd=0.0, device_s=0.0))
    print("a", number, flush=True)
    open_numbers.append(number)
    if len(open_numbers) > 3:
        number = open_numbers.pop(0)
        log.settled(number, ledger_row())
        print("s", number, flush=True)
