"""The manifest: one line a picture, from several processes and from ones that were killed."""

from __future__ import annotations

from ernie_image_nf4.generation.manifest import (
    MANIFEST,
    Record,
    append,
    merge_manifests,
    part_of,
    read_manifest,
    to_line,
)
from ernie_image_nf4.generation.settings import Settings

DEFAULTS = Settings("", "", 32, 32, 2, 3.0, seed=0)


def test_manifests_of_several_processes_become_one(tmp_path):
    records = [Record(f"000{number}.png", "mini", DEFAULTS, sha256=str(number)) for number in range(4)]
    for record in records[::-1]:
        append(part_of(tmp_path, int(record.sha256) % 2), record)
    append(part_of(tmp_path, 1), Record("0003.png", "mini", DEFAULTS, error="bad luck"))
    merge_manifests(tmp_path)
    failed = Record("0003.png", "mini", DEFAULTS, error="bad luck")
    assert read_manifest(tmp_path / MANIFEST) == [*records[:3], failed]
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]
    merge_manifests(tmp_path, failed=False)
    assert (tmp_path / MANIFEST).read_text() == "".join(f"{to_line(record)}\n" for record in records[:3])
