"""Speed and memory: ways to run ERNIE-Image on one device, each measured in a process of its own.

`run.benchmark` starts the processes, `worker` measures one arm in its process, `report.write_benchmark` writes the
result. `arms` is the table of what is measured; `predictions` and `growth` are the two measures beside drawing;
`summary` has the headline figures.

Imports from evaluation and the rooms below it, never from serving or cli.
"""
