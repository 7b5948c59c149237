"""Ablations: rows of a table that differ in one thing, trained with several seeds, evaluated and compared.

set_file   what is compared: recipes, seeds, benchmarks, how to launch
plan       which parts there are, which are finished, which phases several rows share
parts      runs the open parts with train.py and eval.py as a user would, or writes them as Slurm scripts
results    the table's numbers from the evaluation folders
report     the table, the plot and the page
"""
