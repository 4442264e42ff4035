"""Long work in pieces: each job runs once, and its result is kept as soon as it ends.

`running` is the one resumable runner; the Gaussian toy, suites of experiments and attacks use it.
`processes` has the ways to run jobs: in turn, in a pool of processes, in a process each. `files`
keeps a file per finished job. `progress` shows how far a long job is. The runner does
not know what a job is. It imports `storage` alone; `toy`, `attacks`, `suites`, `clients` and
everything above may import it.
"""
