"""Prompts become picture files that say how they were made.

`single` draws one prompt. `batch` draws many: `prompt_file` reads them, `schedule` plans pictures and batches, `stages`
enhances (`enhancement`), encodes, denoises and decodes them in groups, `manifest` records them, and `contact_sheet`
shows them all. `settings`, `seeding`, `computation`, `image_file` and `failures` serve both.

Imports from `loading`, `memory`, `fast`, `repository`, `upstream` and `errors`.
"""
