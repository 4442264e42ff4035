"""Suites of experiments: which runs a table needs, and how each is trained, scored and kept.

`planning` lists the cells of a suite, `cell` runs one in its own process, and `running` runs the
cells without a result. `fedpdm.config.suite` reads suites; `fedpdm.reporting.suite_tables` makes
their tables. It may import `engines` and the rooms below; `commands` imports it.
"""
