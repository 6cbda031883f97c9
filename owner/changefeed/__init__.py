"""How does one changefeed run: its record, its source, its progress and its load?"""
