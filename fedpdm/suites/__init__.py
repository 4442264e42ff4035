"""Suites of experiments: which runs a table needs, and how each is trained, scored and kept.

`planning` makes the cells of a suite, `cell` runs one, in a process of its own, `running` runs
what has no result yet. What a suite is, is read in `fedpdm.config.suite`; its tables are
`fedpdm.reporting.suite_tables`. It imports `engines` and the rooms below.
"""
