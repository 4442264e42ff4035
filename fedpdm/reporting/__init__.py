"""What people look at: pictures, the report page, experiment trackers, summaries and tables.

It reads what runs have written and draws it. It imports `evaluation` and the rooms below.
"""
