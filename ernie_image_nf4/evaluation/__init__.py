"""Fidelity: how far quantized pipelines are from an original one, in pictures, predictions, weights and bytes.

`run.evaluate` measures and `report.write_report` writes the result. `pictures`, `predictions`, `weights` and `metrics`
hold one measure each; `baselines` are other libraries' quantizations to compare with.

Imports from quantization and the rooms below it, never from benchmarking, serving or cli.
"""
