"""An original-precision repository becomes an NF4 repository.

`convert` leads through it. `layer_selection` decides which tensors become NF4, `weight_writer` streams them from file
to file, `scale_search` quantizes one weight, and `calibration` (with `calibration_data` and `gptq`) rounds the
transformer for what its layers need. `resumable_output` keeps finished components, `model_card` describes the result.
`family` knows ERNIE-Image from ERNIE-Image-Turbo, and `synthetic` makes originals of both with random weights.

Imports from `generation` (prompt files), `loading`, `memory`, `repository`, `upstream` and `errors`.
"""
