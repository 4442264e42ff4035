"""Long work in pieces: jobs that are run, kept as they end, and not run again.

`running` is the one resumable runner; the Gaussian toy, suites of experiments and attacks use it.
`processes` has the ways to run jobs: in turn, in a pool of processes, in a process each. `files`
keeps a file per finished job. `progress` shows how far a long job is. What a job is, the runner
does not know. It imports `storage` alone.
"""
