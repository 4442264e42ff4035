"""What people look at: pictures, the report page, experiment trackers, summaries and tables.

It reads what runs have written and draws it. It may import `evaluation` and the
rooms below; `publishing`, `clients`, `strategies` and everything above may import it.
"""
