"""The owner CLI: a client of the admin API (any owner's), and the command that runs an owner.

main.py holds the groups and what all commands share, client.py finds an owner that answers, shapes.py is the JSON (and its
description), output.py prints; cluster.py, changefeed.py, table.py and service.py hold the commands.
"""
