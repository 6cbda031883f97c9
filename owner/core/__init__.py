"""The pure core of the scheduler: no clock, thread, socket, log or random; numpy and
tablewire.model alone.

tick.py is the recipe, transitions.py the rules as one table, tables.py the columns that the rules
move.
"""
