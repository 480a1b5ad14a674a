"""What a task makes of hidden states: one file for each task that needs more than a head.

`embed` pools them to vectors, `score` gives log-probabilities of tokens, `explain` reports attention weights.
"""
