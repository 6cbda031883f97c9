"""The owner CLI: a client of the admin API, and the command that runs an owner.

main.py assembles the commands, options.py holds what all of them share, client.py finds an owner
that answers, json_objects.py makes the JSON and output.py prints; cluster.py, changefeed.py,
table.py, events.py, top.py and serve.py hold the commands.
"""
