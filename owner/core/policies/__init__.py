"""The policies, one in each module: which spans to add, remove and move.

A tick runs them in this order: add_and_remove, drain, move, rebalance; planner.py decides where spans
go. Each works on the spans that are ready for it and ignores the others, so that a span that cannot
proceed never delays a later policy on other spans.
"""
