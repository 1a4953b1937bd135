"""Which videos come from one recording."""

from __future__ import annotations

from pathlib import Path

from seco.data.splits import recordings
from seco.evaluation.splits import video_groups
from seco.features.store import read_features
from tests.seco.made_features import made_rows, write_clusters


def test_recordings_are_told_by_file_names() -> None:
    ucf = ["Archery/v_Archery_g01_c01.avi", "Archery/v_Archery_g12_c03.avi"]
    assert recordings(ucf, ["Archery"] * 2) == ["v_archery_g01", "v_archery_g12"]
    hmdb = [
        "brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi",
        "brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_1.avi",
        "pour/#122_Pouring_Milk__(1)_pour_u_nm_np1_fr_med_3.avi",
    ]
    assert recordings(hmdb, ["brush_hair", "brush_hair", "pour"]) == [
        "april_09",
        "april_09",
        "#122_pouring_milk__(1)",
    ]
    assert recordings([*ucf, "x.mp4"], ["a"] * 3) is None


def test_a_group_column_comes_before_names_and_names_before_single_videos(tmp_path: Path) -> None:
    rows = made_rows([0, 0, 1], [{}, {}, {}])
    write_clusters(tmp_path, videos=3, rows=rows)
    assert video_groups(read_features(tmp_path)) == (["v000", "v001", "v002"], "single videos")
    named = [{**row, "source": f"a/v_A_g0{n // 2}_c{n}.avi"} for n, row in enumerate(rows)]
    write_clusters(tmp_path, videos=3, rows=named)
    expected = (["v_a_g00", "v_a_g00", "v_a_g01"], "recordings")
    assert video_groups(read_features(tmp_path)) == expected
    table = tmp_path / "videos.csv"
    header, *lines = table.read_text("utf-8").splitlines()
    given = ("tape 1", "", "tape 1")
    lines = [f"{line},{group}" for line, group in zip(lines, given, strict=True)]
    table.write_text("\n".join([f"{header},group", *lines]) + "\n")
    assert video_groups(read_features(tmp_path)) == (["tape 1", "v001", "tape 1"], "groups")
