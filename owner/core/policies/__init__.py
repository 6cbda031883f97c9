"""What should change, one policy a file, in order of urgency: basic, drain, move.

Each works on the spans that are ready for it and leaves the others alone, so that a span that
cannot proceed never keeps a later policy from working on other spans.
"""
