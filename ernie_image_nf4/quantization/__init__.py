"""An original-precision repository becomes an NF4 repository.

`convert` leads through it. `layer_selection` decides which tensors become NF4, `weight_writer` streams them from file
to file, `scale_search` quantizes one weight. `calibration` rounds the transformer for what its layers need:
`calibration_data` draws with a `streamed_original`, `block_rounding` takes block after block, `layer_sums` and `gptq`
round a layer, `calibration_needs` says what it takes. `resumable_output` keeps finished components and checkpoints,
`model_card` describes the result. `family` knows ERNIE-Image from ERNIE-Image-Turbo, and `synthetic` makes originals
of both with random weights.

Imports from `generation` (prompt files), `loading`, `memory`, `fast`, `repository`, `upstream` and `errors`.
"""
