"""Who asked, what they may spend, and the ledger of what they did: keys, budgets, journals, the bank."""
