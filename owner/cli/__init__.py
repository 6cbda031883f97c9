"""The owner CLI: a client of the admin API, and the command that runs an owner.

main.py assembles the commands; cluster.py, changefeed.py, table.py, events.py, top.py and serve.py
hold them. options.py and parameters.py hold what they share, client.py finds an owner that answers,
json_objects.py makes the JSON, and output.py prints.
"""
