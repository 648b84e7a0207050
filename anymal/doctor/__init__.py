"""What this machine has, and what to do about what is missing: the table of ``anymal doctor``.

1. `examine`: the list of checks; runs them, some in processes of their own, and makes the table. Read it first.
2. `libraries`: AnyMAL itself, Python, and the packages that a run imports.
3. `gpus`: whether torch, driver and GPUs fit one another.
4. `machine`: GPU driver, cores, memory, disks, Slurm, accounts.
5. `rows`: a line of the table.

Only the standard library is imported here: whatever is broken becomes a row.
"""
