"""Networks that this repository backdoors itself, and what every method makes of them.

    python -m benchmarks.suite smoke          # six attacks, three methods, one seed; twenty minutes on two cores
    python -m benchmarks.suite day            # all development networks, all methods, three seeds; cut off and go on
    python -m benchmarks.suite validation     # a look at the validation set, which is written to looks.csv
    python -m benchmarks.suite table          # the tables of what is there

`networks.py` says which networks there are and in which set each is, `cells.py` what is measured on one of them,
`slices.py` which cells belong together, `tables.py` what is made of the rows, `__main__.py` runs them.
"""
