"""What this machine and a cluster can do, finding by finding, each with its remedy.

`world.py` says what is looked at, `gather.py` and `needs.py` look, `checks.py` and `machine_checks.py` judge, and are
pure, `command.py` prints.
"""
