"""The policies, one in each module: which spans to add, remove and move.

Each works on the spans that are ready for it and ignores the others, so that a span that cannot
proceed never delays a later policy on other spans.
"""
