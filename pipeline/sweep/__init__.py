"""`sweep`: an experiment plan as one command. Plans, runs, claims and what came of them. Imports no torch.

`plan` reads a plan, `variants` expands it into runs, `folder` knows what lies on the disk, `claims` keeps processes off
each other's runs, `schedule` works through them, `collect` gathers what they came to.
"""
