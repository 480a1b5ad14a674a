"""API keys, budgets and the ledger: who may send requests, what they may spend, and what they used."""
